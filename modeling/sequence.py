"""From the parts of a document to the rows that the decoder reads.

    part:   text "a seven"             image, 2 x 2 codes
    rows:   <begin:text> a seven <end> <begin:image> c0 c1 c2 c3

Each span is one begin marker followed by its content rows; where spans are of free length, an end is the last of them,
and they lie on one axis whatever the grid of their tokens. The rows of a modality of several codebooks hold their codes
as the objective's layout says, see `Codebooks`. A target span whose objective corrupts it, and which more content
follows, is written twice: the noised rows, private to themselves, then a clean copy at the same positions for the rest
of the document to read, as it will be at generation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from omniform.errors import OmniformError
from omniform.modeling.codebooks import Codebooks, CodedRows
from omniform.modeling.objectives.base import ContinuousRows, Objective
from omniform.tokenizers.base import Latents, Tokens
from omniform.tokenizers.vocabulary import Vocabulary


class SequenceError(OmniformError):
    """Parts that do not make a sequence, or sequences that do not fit their rows."""


class Role(StrEnum):
    """Whether a span is given or to be predicted."""

    CONTEXT = "context"
    TARGET = "target"


@dataclass(frozen=True)
class Part:
    """One entry of a document: its tokens, and whether it is given or to be predicted.

    Attributes:
        opening: the marker of a mode or gap in place of the begin marker; see `Vocabulary.begin`.
        prefix: it is read in both directions, as one block with the parts beside it that are so too (prefix LM).
    """

    modality: str
    tokens: Tokens | Latents
    role: Role
    opening: str | None = None
    prefix: bool = False


@dataclass(frozen=True)
class Span:
    """Content rows [start, start + length) of a sequence, of one block; a part has one such block unless its objective
    learns it block by block. The begin marker stands before the first.

    Attributes:
        noised: the rows are a corrupted target that a clean copy follows.
        hidden: nothing of a target is shown; of objectives that count what they hide.
    """

    modality: str
    start: int
    length: int
    grid: tuple[int, ...]
    role: Role
    noised: bool
    hidden: bool = False


def grid_positions(grid: tuple[int, ...], length: int, first: int) -> npt.NDArray[np.int64]:
    """Return (time, height, width) of each content row, starting at `first` on every axis.

    One axis moves all three coordinates together, so that text sees 1-d positions; an image keeps one time.

    Raises:
        SequenceError: the grid does not hold `length` rows, or has more than three axes.
    """
    if len(grid) == 1:
        return np.repeat(first + np.arange(length)[:, None], 3, axis=1)
    if len(grid) > 3 or int(np.prod(grid)) != length:
        raise SequenceError(f"{length} tokens on the grid {grid}: expected its product, on one to three axes")
    axes = np.indices(grid).reshape(len(grid), -1).T
    positions = np.full((length, 3), first)
    positions[:, 3 - len(grid) :] += axes
    return positions


def span_extent(grid: tuple[int, ...], length: int) -> int:
    """Return by how much a span moves the position of what follows."""
    return length if len(grid) == 1 else max(grid)


def _stretches(length: int, objective: Objective, role: Role, *, read_later: bool) -> list[tuple[int, int, bool, bool]]:
    """Return (first, stop, learnt, private) of the contents of a part that each block holds, in the order of its rows.

    A learnt block that is corrupted always has the objective's whole length, and may so go past the part's contents.
    """
    size, found = objective.block_size or length, []
    for first in range(0, length, size):
        stop = min(first + size, length)
        corrupted = role is Role.TARGET and objective.corrupts
        copied = corrupted and (read_later or stop < length)
        if corrupted:
            found.append((first, first + size, True, copied))
        if copied or not corrupted:
            found.append((first, stop, role is Role.TARGET and not corrupted, False))
    return found


def document_length(
    parts: Sequence[tuple[str, int, Role]],
    vocabulary: Vocabulary,
    objectives: Mapping[str, Objective],
    *,
    learn_order: bool = False,
) -> int:
    """Return the number of rows that a document takes, from (modality, number of codes, role) of its parts."""
    total = 0
    for place, (modality, n_codes, role) in enumerate(parts):
        codebooks = Codebooks.of(modality, vocabulary, objectives[modality].layout)
        length = n_codes + (vocabulary.end_of(modality) is not None) if codebooks is None else codebooks.n_rows(n_codes)
        read_later = learn_order or place < len(parts) - 1
        if role is Role.CONTEXT:
            total += 1 + length
        else:
            stretches = _stretches(length, objectives[modality], role, read_later=read_later)
            total += 1 + sum(stop - first for first, stop, *_ in stretches)
    return total


@dataclass(frozen=True)
class MultimodalSequence:
    """One sample as rows, with its spans in order.

    Attributes:
        modality_ids: place in the vocabulary of the modality of each row's span, its begin marker included.
        span_positions: of each row in its span: 0 for the begin marker, then 1, 2, ...
        next_spans: (row, id) pairs: the row ends a span, and the id is what follows it: the begin marker of the next
            span, or the vocabulary's `end` after the last. Empty unless the order of spans is learnt.
        noise_key: 64 bits that identify this sample's visit; keys its corruption.
        vectors: by continuous modality, its content rows and what they hold.
        coded: by modality of several codebooks, its content rows and what they hold.
    """

    token_ids: npt.NDArray[np.int64]
    modality_ids: npt.NDArray[np.int64]
    span_positions: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    block_ids: npt.NDArray[np.int64]
    bidirectional: npt.NDArray[np.bool_]
    private: npt.NDArray[np.bool_]
    spans: tuple[Span, ...]
    next_spans: tuple[tuple[int, int], ...] = ()
    noise_key: int = 0
    vectors: Mapping[str, ContinuousRows] = field(default_factory=dict)
    coded: Mapping[str, CodedRows] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)

    def cut(self, start: int, stop: int) -> "MultimodalSequence":
        """Return some of the rows, without their spans."""
        arrays = (
            "token_ids",
            "modality_ids",
            "span_positions",
            "position_ids",
            "block_ids",
            "bidirectional",
            "private",
        )
        vectors = {}
        for name, held in self.vectors.items():
            first, last = torch.searchsorted(held.rows, torch.tensor([start, stop])).tolist()
            own = slice(first, last)
            vectors[name] = ContinuousRows(held.rows[own] - start, held.values[own], held.times[own])
        coded = {name: held.cut(start, stop) for name, held in self.coded.items()}
        return MultimodalSequence(
            **{name: getattr(self, name)[start:stop] for name in arrays}, spans=(), vectors=vectors, coded=coded
        )

    @classmethod
    def build(
        cls,
        parts: Sequence[Part],
        vocabulary: Vocabulary,
        objectives: Mapping[str, Objective],
        noise_key: int = 0,
        *,
        learn_order: bool = False,
    ) -> "MultimodalSequence":
        """Lay the parts out as rows.

        Args:
            learn_order: what follows each span is learnt too, read from the span's last clean row; the last span then
                needs a clean copy like the others.

        Raises:
            SequenceError: no parts, a modality without an objective, a part of a prefix that is learnt, vectors where
                codes are expected or the other way round, or codes on another grid than that of their codebooks.
            VocabularyError: codes that the vocabulary does not hold.
        """
        if not parts:
            raise SequenceError("a sequence needs at least one part")
        ids: list[npt.NDArray[np.int64]] = []
        span_positions: list[npt.NDArray[np.int64]] = []
        positions: list[npt.NDArray[np.int64]] = []
        blocks: list[tuple[int, int, int, bool, bool]] = []  # (rows, number, modality, bidirectional, private)
        number = -1
        spans: list[Span] = []
        next_spans: list[tuple[int, int]] = []
        vectors: dict[str, list[tuple[int, Tensor]]] = {}
        coded: dict[str, list[tuple[int, CodedRows]]] = {}
        row, position = 0, 0
        for place, part in enumerate(parts):
            if part.modality not in objectives:
                raise SequenceError(f"no objective for modality {part.modality!r}; there is one for {[*objectives]}")
            if part.prefix and part.role is Role.TARGET:
                raise SequenceError(
                    f"a learnt part of {part.modality} is in a prefix, whose rows would see their answers"
                )
            objective, modality_id = objectives[part.modality], vocabulary.place_of(part.modality)
            rows = _coded_rows(part, vocabulary, objective)
            contents, values = (
                _contents(part, vocabulary) if rows is None else (np.full(len(rows), vocabulary.mask), None)
            )
            grid = part.tokens.grid
            end_id = vocabulary.end_of(part.modality)
            if end_id is not None:
                contents = np.append(contents, end_id) if rows is None else contents
                grid = (len(contents),)
            length = len(contents)
            read_later = learn_order or place < len(parts) - 1
            stretches = _stretches(length, objective, part.role, read_later=read_later)
            most = max(stop for _, stop, *_ in stretches)
            if most > length:
                contents = np.append(contents, np.full(most - length, end_id if rows is None else vocabulary.mask))
            ids.append(np.array([vocabulary.begin(part.modality, part.opening)]))
            span_positions.append(np.zeros(1, dtype=np.int64))
            positions.append(np.full((1, 3), position))
            number += not (part.prefix and place > 0 and parts[place - 1].prefix)
            blocks.append((1, number, modality_id, part.prefix, False))
            row, position = row + 1, position + 1
            content_positions = grid_positions(grid, most, position)
            for first, stop, learnt, unread in stretches:
                n_rows, number = stop - first, number + (not part.prefix)
                ids.append(contents[first:stop])
                span_positions.append(np.arange(first + 1, stop + 1))
                positions.append(content_positions[first:stop])
                blocks.append((n_rows, number, modality_id, part.prefix or objective.bidirectional, unread))
                role = Role.TARGET if learnt else Role.CONTEXT
                own_grid = (n_rows,) if objective.block_size else grid
                spans.append(Span(part.modality, row, n_rows, own_grid, role, unread))
                if values is not None:
                    vectors.setdefault(part.modality, []).append((row, values[first:stop]))
                if rows is not None:
                    # An end fills up a block, as it does where rows hold one code.
                    held = rows[torch.arange(first, stop).clamp(max=length - 1)]
                    coded.setdefault(part.modality, []).append((row, CodedRows(torch.arange(n_rows), held)))
                row += n_rows
            position += span_extent(grid, length)
            if learn_order:
                last = place == len(parts) - 1
                next_spans.append((row - 1, vocabulary.end if last else vocabulary.begin(parts[place + 1].modality)))
        rows_per_block, *of_blocks = zip(*blocks, strict=True)
        block_ids, modality_ids, bidirectional, private = (np.repeat(values, rows_per_block) for values in of_blocks)
        return cls(
            np.concatenate(ids),
            modality_ids,
            np.concatenate(span_positions),
            np.concatenate(positions),
            block_ids,
            bidirectional,
            private,
            tuple(spans),
            tuple(next_spans),
            noise_key,
            {
                name: ContinuousRows.join([(first, ContinuousRows.clean(torch.arange(len(v)), v)) for first, v in held])
                for name, held in vectors.items()
            },
            {name: CodedRows.join(held) for name, held in coded.items()},
        )


def _coded_rows(part: Part, vocabulary: Vocabulary, objective: Objective) -> Int[Tensor, "S Q"] | None:
    """Return what the rows of a part hold, its end included; None where rows hold one content."""
    codebooks = Codebooks.of(part.modality, vocabulary, objective.layout)
    if codebooks is None:
        return None
    tokens, n_codebooks = part.tokens, codebooks.layout.n_codebooks
    if not isinstance(tokens, Tokens) or len(tokens.grid) != 2 or tokens.grid[1] != n_codebooks:
        raise SequenceError(f"{part.modality} of grid {tuple(tokens.grid)}, expected codes of (T, {n_codebooks})")
    return codebooks.arrange(tokens.codes.view(tokens.grid))


def _contents(part: Part, vocabulary: Vocabulary) -> tuple[npt.NDArray[np.int64], Float[Tensor, "N C"] | None]:
    """Return the ids of a part's contents, and the vectors that stand in their place if it has any."""
    channels = vocabulary.channels_of(part.modality)
    if isinstance(part.tokens, Tokens):
        if channels is not None:
            raise SequenceError(f"codes of {part.modality}, which this model reads as vectors of {channels} numbers")
        return vocabulary.to_ids(part.modality, part.tokens.codes).numpy(), None
    values = part.tokens.values
    if values.shape[-1] != channels:
        wanted = "codes" if channels is None else f"vectors of {channels} numbers"
        raise SequenceError(f"vectors of {values.shape[-1]} numbers for {part.modality}, expected {wanted}")
    return np.full(len(values), vocabulary.mask), values
