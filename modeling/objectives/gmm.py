"""Next-token prediction of vectors: every one is drawn from a mixture of Gaussians that those before it decide.

Source: GIVT (arXiv:2312.02116), its causal model.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.modeling.objectives.base import ContinuousRows, Corrupted, Draw, Kept, Objective, SpanState, TargetSpans
from omniform.modeling.objectives.mixture import Mixture, guided_sample, n_parameters


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class MixtureObjective(Objective):
    """What objectives share that learn the density of a vector as a mixture of diagonal Gaussians.

    The loss of a token is its negative log-density divided by its channels, in nats per number.

    Attributes:
        components: of a mixture.
        min_scale: below every standard deviation; GIVT's is 1e-6, but pixels that repeat exactly would then outweigh
            all.
    """

    weight: float = Field(default=1.0, gt=0)
    components: int = Field(default=16, ge=1)
    min_scale: float = Field(default=1e-2, gt=0)

    continuous: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"top_k", "top_p"})

    def n_outputs(self, channels: int) -> int:
        """Return how many numbers describe a mixture."""
        return n_parameters(channels, self.components)

    def loss(
        self,
        logits: Float[Tensor, "M W"],
        labels: Int[Tensor, "M"] | Float[Tensor, "M C"],
        weights: Float[Tensor, "M"],
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the sum of the weighted negative log-densities per number; `z_loss` does not apply."""
        losses = -Mixture.of(logits, self.components, self.min_scale).log_density(labels) / labels.shape[-1]
        return (losses * weights).where(weights > 0, 0.0).sum()

    def guide(
        self, conditional: Float[Tensor, "R W"], unconditional: Float[Tensor, "R W"], scale: float
    ) -> Float[Tensor, "R 2 W"]:
        """Return both: their densities are combined when a vector is drawn, see `guided_sample`."""
        return torch.stack([conditional, unconditional], dim=1)

    def sample(
        self, outputs: Float[Tensor, "R *W"], step: int, positions: Int[Tensor, "R"], draw: Draw
    ) -> tuple[Float[Tensor, "R C"], Float[Tensor, "R"]]:
        """Draw a vector per row of what `step` got, and return its log-density under the conditional mixture too."""
        branches = outputs.unbind(1) if outputs.ndim == 3 else (outputs,)
        mixture, *other = (Mixture.of(branch, self.components, self.min_scale) for branch in branches)
        if other:
            values = guided_sample(mixture, other[0], draw.guidance_scale, step, positions, draw)
        else:
            values = mixture.sample(step, positions, draw)
        return values, mixture.log_density(values)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Gmm(MixtureObjective):
    """Next-token prediction over vectors, with teacher forcing; one vector and one commit per step."""

    kind: Literal["gmm"] = "gmm"

    bidirectional: ClassVar[bool] = False
    corrupts: ClassVar[bool] = False
    shift: ClassVar[int] = -1
    commits: ClassVar[bool] = True

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Count every vector."""
        return Corrupted(targets.token_ids, np.ones(len(targets.token_ids), dtype=np.float32), labels=targets.values)

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open an empty span of `length` vectors; `steps` does not apply.

        Vectors to keep are put where they belong as the span grows, so a new one sees those before it alone.
        """
        return SpanState(torch.zeros(0, dtype=torch.int64), 0, length, kept=kept)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The newest vector's row, or the begin marker before the first."""
        return state.token_ids[-1:] if state.step else torch.tensor([begin_id])

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows | None:
        """Return the newest vector; None before the first."""
        if state.values is None:
            return None
        return ContinuousRows.clean(torch.zeros(1, dtype=torch.int64), state.values[-1:])

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R *W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Append one vector, the one that is kept in its place if there is one."""
        if state.kept is not None and not state.kept.wanted[state.step]:
            assert state.kept.values is not None
            new = state.kept.values[state.step : state.step + 1]
        else:
            new, _ = self.sample(logits, state.step, torch.tensor([state.step]), draw)
        values = new if state.values is None else torch.cat([state.values, new])
        token_ids, step = torch.full((len(values),), mask_id), state.step + 1
        return replace(state, token_ids=token_ids, values=values, step=step, done=step == state.n_steps)
