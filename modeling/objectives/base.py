"""What an objective is: how a span is learnt and how it is produced, side by side.

An objective is a frozen pydantic dataclass: its configuration is the object. It sees ids and logits, never the
network, the batch layout or a device.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from omniform.kernels.cross_entropy import cross_entropy
from omniform.modeling.codebooks import Codebooks
from omniform.tokenizers.codebook_layout import LayoutKind


@dataclass(frozen=True)
class ContinuousRows:
    """Rows that hold vectors in place of ids.

    Attributes:
        rows: where they are, ascending, in whatever the owner lays out.
        values: what they hold.
        times: how far from data (0) to noise (1) each of them is.
    """

    rows: Int[Tensor, "M"]
    values: Float[Tensor, "M C"]
    times: Float[Tensor, "M"]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def clean(cls, rows: Int[Tensor, "M"], values: Float[Tensor, "M C"]) -> "ContinuousRows":
        """Return rows of data."""
        return cls(rows, values, torch.zeros(len(rows)))

    @classmethod
    def join(cls, held: Sequence[tuple[int, "ContinuousRows"]]) -> "ContinuousRows":
        """Join rows, each with what is to be added to its places; in ascending order."""
        return cls(
            torch.cat([vectors.rows + first for first, vectors in held]),
            torch.cat([vectors.values for _, vectors in held]),
            torch.cat([vectors.times for _, vectors in held]),
        )

    def to(self, device: torch.device | str) -> "ContinuousRows":
        """Return the same on `device`."""
        return ContinuousRows(self.rows.to(device), self.values.to(device), self.times.to(device))


@dataclass(frozen=True)
class TargetSpans:
    """The target spans of one modality in a packed batch, their contents laid end to end (ragged).

    M is the number of contents, S of spans. A content is one row; where rows hold several codes, it is one code or the
    end.

    Attributes:
        token_ids: clean contents, ids of the model.
        rows: flat index of each content's row in the (B * L) rows of its batch.
        span_index: which span a content belongs to, 0 to S - 1, ascending.
        positions: place of a content within its span, row after row and in a row from the first codebook on.
        lengths: number of contents per span.
        noise_keys: key of the sample that a span belongs to.
        span_numbers: place of the span within its sample.
        values: clean contents of a continuous modality, whose ids say nothing; None for a discrete one.
        codebooks: which of `n_codebooks` each content is of; None where there is one.
        all_hidden: spans of which nothing may be shown; none unless given.
    """

    token_ids: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    span_index: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    noise_keys: npt.NDArray[np.uint64]
    span_numbers: npt.NDArray[np.int64]
    values: Float[Tensor, "M C"] | None = None
    codebooks: npt.NDArray[np.int64] | None = None
    n_codebooks: int = 1
    all_hidden: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Corrupted:
    """Result of the forward process.

    Attributes:
        token_ids: what the network reads in place of the clean contents; of several codebooks also `NOTHING`.
        loss_weights: weight of each content row's prediction; 0 where there is nothing to predict.
        count: what the loss sum is to be divided by; the sum of the weights unless given.
        values: what the network reads in place of the clean vectors; None where it reads those, or ids.
        times: of each content, with `values`; see `ContinuousRows`.
        hidden: contents whose vectors the network does not read, but the id that stands for them.
        labels: what is predicted at each content, where that is no id.
    """

    token_ids: npt.NDArray[np.int64]
    loss_weights: npt.NDArray[np.float32]
    count: float | None = None
    values: Float[Tensor, "M C"] | None = None
    times: Float[Tensor, "M"] | None = None
    hidden: npt.NDArray[np.bool_] | None = None
    labels: Float[Tensor, "M C"] | None = None


@runtime_checkable
class Draw(Protocol):
    """Keyed randomness of one span being generated; given by the sampler, so that objectives stay pure."""

    temperature: float
    guidance_scale: float

    def tokens(
        self, logits: Float[Tensor, "N W"], step: int, positions: Int[Tensor, "N"]
    ) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
        """Return one choice per row, an index into W, and its log-probability under the truncated softmax."""
        ...

    def gumbel(self, step: int, positions: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """Return standard Gumbel noise for each position."""
        ...

    def normal(self, step: int, positions: Int[Tensor, "N"], channels: int) -> Float[Tensor, "N C"]:
        """Return standard normal noise for each position and channel."""
        ...

    def smallest(self, scores: Float[Tensor, "N"], count: int) -> Bool[Tensor, "N"]:
        """Return which `count` scores are the smallest; of equal ones the first."""
        ...

    def above(self, scores: Float[Tensor, "N"], bound: float) -> Bool[Tensor, "N"]:
        """Return which scores are larger than `bound`."""
        ...

    def subset(self, candidates: Bool[Tensor, "N"], count: int, step: int) -> Bool[Tensor, "N"]:
        """Return a random subset of `count` of the candidates."""
        ...


class Asked(NamedTuple):
    """The codes that a step is about, where rows hold several.

    Attributes:
        rows: place of the row that predicts each of them among those that `Objective.inputs` named.
        codebooks: of each.
    """

    rows: Int[Tensor, "P"]
    codebooks: Int[Tensor, "P"]


@dataclass(frozen=True)
class Kept:
    """The item that a span is an edit of.

    Attributes:
        wanted: which contents are to be new.
        token_ids: all contents, those that are to be new too.
        values: likewise, of a continuous modality, whose ids say nothing.
    """

    wanted: Bool[Tensor, "N"]
    token_ids: Int[Tensor, "N"]
    values: Float[Tensor, "N C"] | None = None


@dataclass(frozen=True)
class SpanState:
    """A span being generated.

    Attributes:
        token_ids: contents so far; in masked spans the mask id stands where nothing is decided yet. Where rows hold
            several codes, what each row holds of each codebook, as in `CodedRows`.
        step: number of steps done; of those of the block that is open, where there are blocks.
        n_steps: number of steps in all, or of that block; for spans that end themselves the largest number allowed.
        done: nothing is left to do.
        n_final: leading contents that no later step changes, so that their rows may stay in the cache; only of
            objectives with blocks.
        kept: of an edited span; None if all contents are new.
        confidence: log-probability at which each content was decided, for objectives that may take a decision back.
        values: contents so far of a continuous modality.
    """

    token_ids: Int[Tensor, "N *Q"]
    step: int
    n_steps: int
    done: bool = False
    n_final: int = 0
    kept: Kept | None = None
    confidence: Float[Tensor, "N"] | None = None
    values: Float[Tensor, "N C"] | None = None


class Objective(ABC):
    """How spans of a modality are learnt and produced.

    Class attributes:
        kind: its name in configurations.
        corrupts: training replaces contents, so that what follows needs a clean copy of the span.
        shift: the prediction of a content row is read from the row at this offset from it: -1 or 0.
        commits: every row that a step forwards is final and stays in the cache.
        continuous: its tokens are vectors, not codes.
        ignores: names of `SamplingSettings` that say nothing to it.

    Attributes:
        block_size: spans are cut into blocks of so many contents, each learnt and produced from those before it; the
            last one that is learnt is filled up with ends. None for spans that are one block.
    """

    kind: Any
    weight: float
    block_size: int | None = None
    corrupts: ClassVar[bool]
    shift: ClassVar[int]
    commits: ClassVar[bool]
    continuous: ClassVar[bool] = False
    ignores: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def bidirectional(self) -> bool:
        """Whether rows of such a span see their whole span; a class attribute where it is no setting."""

    def n_outputs(self, channels: int) -> int:
        """Return how many numbers a continuous objective needs for each token of `channels` numbers."""
        return channels

    @property
    def layout(self) -> LayoutKind | None:
        """How rows take the codes of several codebooks; None of an objective that is for one, see `CodedObjective`."""
        return None

    @abstractmethod
    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Forward process: choose what the network reads and which predictions count."""

    def loss(
        self,
        logits: Float[Tensor, "M W"],
        labels: Int[Tensor, "M"] | Float[Tensor, "M C"],
        weights: Float[Tensor, "M"],
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the SUM of the weighted losses; its count is that of `corrupt`. Rows of weight 0 add exactly 0.

        Args:
            logits: over the ids that the span may hold; of a continuous objective the `n_outputs` of each row.
            labels: of a continuous objective those of `corrupt`.
        """
        losses = cross_entropy(logits, labels, z_loss)
        return (losses * weights).where(weights > 0, 0.0).sum()

    @abstractmethod
    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open a span: of exactly `length` contents if the modality has a fixed grid, else of at most `length`.

        Args:
            kept: when a span is edited, what stays of it.
        """

    @abstractmethod
    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R *Q"]:
        """Return the ids of the rows to forward for the next step; `step` takes the outputs of exactly those rows."""

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows | None:
        """Return what those of the rows hold that are read as vectors of `channels` numbers, by place among them; None
        for an objective over codes."""
        return None

    def guide(
        self, conditional: Float[Tensor, "R W"], unconditional: Float[Tensor, "R W"], scale: float
    ) -> Float[Tensor, "R *V"]:
        """Return what `step` is to read of the outputs with and without the condition: those that are pushed away from
        what the model says without it, `uncond + scale * (cond - uncond)`.

        Scale 1 gives the conditional ones. Source: classifier-free guidance, arXiv:2207.12598, whose 1 + w is our
        scale.
        """
        return unconditional + scale * (conditional - unconditional)

    @abstractmethod
    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R *W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Reverse process: one step.

        Args:
            logits: over the ids that the span may hold, for the rows that `inputs` named, or the codes that `asked`
                did, each over those of its codebook and the end; of a continuous objective their `n_outputs`; with
                guidance, what `guide` made of them.
            first_id: id of the logits' first column; says nothing where there are several codebooks.
            end_id: id that ends the span, or None if its length is fixed.
        """


class CodedObjective(Objective):
    """An objective that takes several codebooks too.

    What it makes of them is a `SpanState` of its own; `inputs` names rows (R, Q) then, or the begin marker alone.
    """

    @property
    @abstractmethod
    def layout(self) -> LayoutKind:
        """How rows take the codes of several codebooks."""

    @abstractmethod
    def begin_coded(self, length: int, steps: int | None, mask_id: int, codebooks: Codebooks) -> SpanState:
        """Open a span of at most `length` rows of several codes."""

    @abstractmethod
    def asked(self, state: SpanState) -> Asked:
        """Return the codes that the next step decides: `step` takes a row of logits for each."""
