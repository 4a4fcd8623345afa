"""The forward process of a packed batch: what the network reads, and what it is asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from omniform.modeling.attention_pattern import PADDING, AttentionPattern
from omniform.modeling.codebooks import CodedRows
from omniform.modeling.objectives.base import ContinuousRows, Corrupted, Objective
from omniform.modeling.packed_batch import PackedBatch
from omniform.tokenizers.vocabulary import Vocabulary

NEXT_SPAN = "next_span"
ROUTER_BALANCE, ROUTER_Z = "router_balance", "router_z"


@dataclass(frozen=True)
class Predictions:
    """What one head is asked for in a batch, and the answers.

    Attributes:
        rows: flat index, in (B * L), of the rows whose hidden states predict.
        labels: right answers, counted from the first id of the range that is predicted; of a continuous modality what
            its objective predicts.
        weights: weight per prediction; 0 counts for nothing.
        count: what the loss sum is to be divided by.
        codebooks: which one each prediction is of, where there are several.
    """

    rows: Int[Tensor, "M"]
    labels: Int[Tensor, "M"] | Float[Tensor, "M C"]
    weights: Float[Tensor, "M"]
    count: float
    codebooks: Int[Tensor, "M"] | None = None

    def to(self, device: torch.device | str) -> "Predictions":
        """Return the same on `device`."""
        codebooks = None if self.codebooks is None else self.codebooks.to(device)
        return Predictions(self.rows.to(device), self.labels.to(device), self.weights.to(device), self.count, codebooks)

    @classmethod
    def dummy(cls, channels: int | None = None, n_codebooks: int = 1) -> "Predictions":
        """Return one prediction of weight 0, so that a head without targets runs on every rank all the same.

        Args:
            channels: of a continuous modality.
        """
        row = torch.zeros(1, dtype=torch.int64)
        labels = row if channels is None else torch.zeros(1, channels)
        return cls(row, labels, torch.zeros(1), 0.0, None if n_codebooks == 1 else row)


@dataclass(frozen=True)
class CorruptedBatch:
    """A packed batch after its objectives' forward process: what the network reads, and what it is asked.

    Attributes:
        predictions: every modality of the vocabulary, in its order, then `NEXT_SPAN`: which span follows. What has no
            targets has one dummy of weight 0, so that all ranks run the same modules in the same order.
        vectors: by continuous modality that the batch holds, its content rows, flat, and what they hold.
        coded: by modality of several codebooks that the batch holds, its content rows, flat, and what they hold.
    """

    token_ids: Int[Tensor, "B L"]
    modality_ids: Int[Tensor, "B L"]
    span_positions: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "B L 3"]
    pattern: AttentionPattern
    predictions: Mapping[str, Predictions]
    vectors: Mapping[str, ContinuousRows] = field(default_factory=dict)
    coded: Mapping[str, CodedRows] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, float]:
        """What each loss sum is to be divided by: for the terms of routers the rows that are no padding."""
        n_rows = float(self.routed.sum())
        counts = {term: predictions.count for term, predictions in self.predictions.items()}
        return {**counts, ROUTER_BALANCE: n_rows, ROUTER_Z: n_rows}

    @property
    def routed(self) -> Bool[Tensor, "B L"]:
        """The rows whose experts count: all but padding."""
        return self.pattern.document_ids != PADDING

    def to(self, device: torch.device | str) -> "CorruptedBatch":
        """Return the batch on `device`."""
        return CorruptedBatch(
            self.token_ids.to(device),
            self.modality_ids.to(device),
            self.span_positions.to(device),
            self.position_ids.to(device),
            self.pattern.to(device),
            {modality: p.to(device) for modality, p in self.predictions.items()},
            {modality: held.to(device) for modality, held in self.vectors.items()},
            {modality: held.to(device) for modality, held in self.coded.items()},
        )


def corrupt(batch: PackedBatch, vocabulary: Vocabulary, objectives: Mapping[str, Objective]) -> CorruptedBatch:
    """Run the forward process of every target span of the batch."""
    token_ids = batch.token_ids.clone()
    flat_ids = token_ids.view(-1)
    predictions, vectors, coded = {}, dict(batch.vectors), dict(batch.coded)
    for modality in vocabulary.names:
        targets = batch.targets.get(modality)
        if targets is None:
            channels, n_codebooks = vocabulary.channels_of(modality), vocabulary.n_codebooks(modality)
            predictions[modality] = Predictions.dummy(channels, n_codebooks)
            continue
        objective = objectives[modality]
        corrupted = objective.corrupt(targets, vocabulary.mask)
        rows, read = torch.from_numpy(targets.rows), torch.from_numpy(corrupted.token_ids)
        counted = corrupted.loss_weights > 0
        codebooks = None
        if targets.codebooks is None:
            flat_ids[rows] = read
        else:
            held, codebooks = coded[modality], torch.from_numpy(targets.codebooks)
            places = torch.searchsorted(held.rows, rows)
            coded[modality] = CodedRows(held.rows, held.ids.index_put((places, codebooks), read))
            codebooks = codebooks[torch.from_numpy(counted)]
        if corrupted.labels is None:
            labels = vocabulary.to_choices(modality, torch.from_numpy(targets.token_ids[counted]), codebooks)
        else:
            labels = corrupted.labels[torch.from_numpy(counted)]
            vectors[modality] = _corrupted(vectors[modality], targets.rows, corrupted)
        predictions[modality] = Predictions(
            torch.from_numpy(targets.rows[counted] + objective.shift),
            labels,
            torch.from_numpy(corrupted.loss_weights[counted]),
            float(corrupted.loss_weights.sum()) if corrupted.count is None else corrupted.count,
            codebooks,
        )
    rows, following = batch.next_spans
    predictions[NEXT_SPAN] = Predictions.dummy()
    if len(rows):
        labels = following - vocabulary.next_span_range.start
        predictions[NEXT_SPAN] = Predictions(rows, labels, torch.ones(len(rows)), float(len(rows)))
    return CorruptedBatch(
        token_ids,
        batch.modality_ids,
        batch.span_positions,
        batch.position_ids,
        batch.pattern,
        predictions,
        vectors,
        coded,
    )


def _corrupted(held: ContinuousRows, rows: npt.NDArray[np.int64], corrupted: Corrupted) -> ContinuousRows:
    """Return the vectors of a batch with the corrupted ones in place of theirs, without the hidden ones."""
    places = torch.searchsorted(held.rows, torch.from_numpy(rows))
    if corrupted.values is not None and corrupted.times is not None:
        values = held.values.index_copy(0, places, corrupted.values)
        held = ContinuousRows(held.rows, values, held.times.index_copy(0, places, corrupted.times))
    if corrupted.hidden is None:
        return held
    shown = torch.ones(len(held), dtype=torch.bool).index_fill(0, places[torch.from_numpy(corrupted.hidden)], False)
    return ContinuousRows(held.rows[shown], held.values[shown], held.times[shown])
