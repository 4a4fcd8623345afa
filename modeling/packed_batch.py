"""Many sequences in the rows of one batch, and where in it each modality's targets are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from omniform.modeling.attention_pattern import PADDING, AttentionPattern
from omniform.modeling.codebooks import NOTHING, CodedRows
from omniform.modeling.objectives.base import ContinuousRows, TargetSpans
from omniform.modeling.sequence import MultimodalSequence, Role, SequenceError, Span
from omniform.tokenizers.vocabulary import Vocabulary


@dataclass(frozen=True)
class PackedBatch:
    """Many sequences in (B, L) rows.

    Attributes:
        modality_ids: place in the vocabulary of each row's modality; that of text where a row is padding.
        span_positions: of each row in its span; 0 where a row is padding.
        targets: the target spans of each modality that has any.
        next_spans: flat rows that end a span whose successor is learnt, and the ids that follow; (2, S).
        vectors: by continuous modality that the batch holds, its content rows, flat, and what they hold.
        coded: by modality of several codebooks that the batch holds, its content rows, flat, and what they hold.
    """

    token_ids: Int[Tensor, "B L"]
    modality_ids: Int[Tensor, "B L"]
    span_positions: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L 3"]
    pattern: AttentionPattern
    targets: Mapping[str, TargetSpans]
    next_spans: Int[Tensor, "2 S"]
    vectors: Mapping[str, ContinuousRows] = field(default_factory=dict)
    coded: Mapping[str, CodedRows] = field(default_factory=dict)


def pack(rows: Sequence[Sequence[MultimodalSequence]], row_length: int, vocabulary: Vocabulary) -> PackedBatch:
    """Lay sequences into rows of `row_length`; the rest of each row is padding.

    Args:
        rows: the sequences of each row, in order; a row may be empty.

    Raises:
        SequenceError: a row's sequences are longer than the row.
    """
    shape = (len(rows), row_length)
    token_ids = np.full(shape, vocabulary.pad)
    modality_ids = np.full(shape, vocabulary.place_of("text"))
    span_positions = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros((*shape, 3), dtype=np.int64)
    document_ids = np.full(shape, PADDING)
    block_ids = np.zeros(shape, dtype=np.int64)
    bidirectional, private = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    found: dict[str, list[tuple[MultimodalSequence, int, Span, int]]] = {}
    next_spans: list[tuple[int, int]] = []
    vectors: dict[str, list[tuple[int, ContinuousRows]]] = {}
    coded: dict[str, list[tuple[int, CodedRows]]] = {}
    for index, sequences in enumerate(rows):
        start = 0
        for document, sequence in enumerate(sequences):
            stop = start + len(sequence)
            if stop > row_length:
                raise SequenceError(
                    f"row {index} holds {sum(map(len, sequences))} tokens, expected at most {row_length}: "
                    "raise data.row_length or split the document"
                )
            here = (index, slice(start, stop))
            token_ids[here], modality_ids[here] = sequence.token_ids, sequence.modality_ids
            span_positions[here], position_ids[here] = sequence.span_positions, sequence.position_ids
            document_ids[here], block_ids[here] = document, sequence.block_ids
            bidirectional[here], private[here] = sequence.bidirectional, sequence.private
            for number, span in enumerate(sequence.spans):
                if span.role is Role.TARGET:
                    found.setdefault(span.modality, []).append((sequence, index * row_length + start, span, number))
            next_spans += [(index * row_length + start + row, following) for row, following in sequence.next_spans]
            for name, held in sequence.vectors.items():
                vectors.setdefault(name, []).append((index * row_length + start, held))
            for name, codes in sequence.coded.items():
                coded.setdefault(name, []).append((index * row_length + start, codes))
            start = stop
    arrays = (document_ids, block_ids, bidirectional, private)
    return PackedBatch(
        torch.from_numpy(token_ids),
        torch.from_numpy(modality_ids),
        torch.from_numpy(span_positions),
        torch.from_numpy(position_ids),
        AttentionPattern(*map(torch.from_numpy, arrays)),
        {modality: _collect(spans) for modality, spans in found.items()},
        torch.tensor(next_spans, dtype=torch.int64).view(-1, 2).T,
        {name: ContinuousRows.join(held) for name, held in vectors.items()},
        {name: CodedRows.join(codes) for name, codes in coded.items()},
    )


def _collect(spans: Sequence[tuple[MultimodalSequence, int, Span, int]]) -> TargetSpans:
    modality = spans[0][2].modality  # of all of them
    if modality in spans[0][0].coded:
        return _collect_coded(spans)
    lengths = np.array([span.length for _, _, span, _ in spans])
    positions = np.concatenate([np.arange(length) for length in lengths])
    first_rows = np.array([offset + span.start for _, offset, span, _ in spans])
    span_index = np.repeat(np.arange(len(spans)), lengths)
    values = [
        s.cut(span.start, span.start + span.length).vectors[modality].values
        for s, _, span, _ in spans
        if modality in s.vectors
    ]
    return TargetSpans(
        token_ids=np.concatenate([s.token_ids[span.start : span.start + span.length] for s, _, span, _ in spans]),
        rows=first_rows[span_index] + positions,
        span_index=span_index,
        positions=positions,
        lengths=lengths,
        noise_keys=np.array([s.noise_key for s, _, _, _ in spans], dtype=np.uint64),
        span_numbers=np.array([number for _, _, _, number in spans]),
        all_hidden=np.array([span.hidden for _, _, span, _ in spans]),
        values=torch.cat(values) if values else None,
    )


def _collect_coded(spans: Sequence[tuple[MultimodalSequence, int, Span, int]]) -> TargetSpans:
    """Return the codes of rows that hold several as contents of their own."""
    held = [s.coded[span.modality].cut(span.start, span.start + span.length).ids.numpy() for s, _, span, _ in spans]
    places = [(ids != NOTHING).nonzero() for ids in held]
    lengths = np.array([len(rows) for rows, _ in places])
    return TargetSpans(
        token_ids=np.concatenate([ids[place] for ids, place in zip(held, places, strict=True)]),
        rows=np.concatenate([o + span.start + rows for (_, o, span, _), (rows, _) in zip(spans, places, strict=True)]),
        span_index=np.repeat(np.arange(len(spans)), lengths),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        noise_keys=np.array([s.noise_key for s, _, _, _ in spans], dtype=np.uint64),
        span_numbers=np.array([number for _, _, _, number in spans]),
        codebooks=np.concatenate([codebooks for _, codebooks in places]),
        n_codebooks=held[0].shape[1],
    )
