"""Masked prediction of vectors: a span is filled in over a few parallel steps, each vector from a mixture of Gaussians.

Source: GIVT (arXiv:2312.02116), its masked model, which follows MaskGIT (arXiv:2202.04200).
"""

from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.modeling.objectives.base import ContinuousRows, Corrupted, Draw, Kept, SpanState, TargetSpans
from omniform.modeling.objectives.gmm import MixtureObjective
from omniform.modeling.objectives.masked import Schedule, counted_mask, n_undecided


@plain_dataclass(frozen=True)
class FillingState(SpanState):
    """A span being filled in.

    Attributes:
        known: contents that are decided; the others are no vectors yet.
    """

    known: Bool[Tensor, "N"] | None = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MaskedGmm(MixtureObjective):
    """Masked prediction over vectors; what is hidden, and the steps of decoding, are those of `Masked`.

    Attributes:
        schedule: of training and of decoding; see `masked_fraction`.
        steps: decoding steps unless the request says otherwise; never more than vectors.
        choice_temperature: scale of the Gumbel noise on the log-density at which a vector was drawn, by which a step
            decides the most confident; it falls linearly to 0 over the steps.
    """

    kind: Literal["masked_gmm"] = "masked_gmm"
    schedule: Schedule = "cosine"
    steps: int = Field(default=8, ge=1)
    choice_temperature: float = Field(default=35.0, ge=0)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Hide vectors by keyed numbers, as many as the span's time asks for."""
        hidden = counted_mask(targets, self.schedule)
        return Corrupted(targets.token_ids, hidden.astype(np.float32), hidden=hidden, labels=targets.values)

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open a span of `length` unknown vectors, or of those to keep and unknown ones for the others."""
        known = torch.zeros(length, dtype=torch.bool) if kept is None else ~kept.wanted
        n_steps, values = min(steps or self.steps, int((~known).sum())), None if kept is None else kept.values
        return FillingState(torch.full((length,), mask_id), 0, n_steps, kept=kept, values=values, known=known)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span: known and unknown vectors see each other."""
        return state.token_ids

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows | None:
        """Return the vectors that are known."""
        assert isinstance(state, FillingState)
        assert state.known is not None
        if state.values is None:
            return None
        return ContinuousRows.clean(state.known.nonzero().flatten(), state.values[state.known])

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R *W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Draw every unknown vector, and keep the most confident, so that gamma(1 - (step + 1) / n_steps) stay unknown.

        Each step decides at least one, and the last one all.
        """
        assert isinstance(state, FillingState)
        assert state.known is not None
        positions = torch.arange(len(state.known))
        unknown = ~state.known
        new, log_density = self.sample(logits[unknown], state.step, positions[unknown], draw)
        values = torch.zeros(len(unknown), new.shape[-1]) if state.values is None else state.values
        values = values.index_copy(0, positions[unknown], new)
        left = 1 - (state.step + 1) / state.n_steps
        n_unknown, n_wanted = int(unknown.sum()), len(unknown) if state.kept is None else int(state.kept.wanted.sum())
        n_left = min(n_undecided(self.schedule, state.step, state.n_steps, n_wanted), n_unknown - 1)
        noise = self.choice_temperature * left * draw.gumbel(state.step, positions)[unknown]
        again = positions[unknown][draw.smallest(log_density.double() + noise, n_left)]
        known = torch.ones_like(state.known).index_fill(0, again, False)
        return replace(state, values=values, known=known, step=state.step + 1, done=bool(known.all()))
