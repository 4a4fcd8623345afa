"""Denoising diffusion: a span of vectors is noise that the prediction of its noise turns into data, step by step.

Sources: DDPM (arXiv:2006.11239) with the cosine schedule of arXiv:2102.09672, in one decoder with text as in
Transfusion (arXiv:2408.11039); DDIM (arXiv:2010.02502) for fewer steps. Here t = 0 is data and t = 1 is noise.
"""

import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.objectives.base import ContinuousRows, Corrupted, Draw, Objective, SpanState, TargetSpans
from omniform.modeling.objectives.flow import SolverState, diffusion_schedule, noise_of, squared_error, values_or_noise

N_TIMES = 1000  # of the chain in training


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Ddpm(Objective):
    """Noise prediction along x_t = sqrt(a_t) * data + sqrt(1 - a_t) * noise, where sqrt(a_t) is nearly cos(pi t / 2).

    Training draws one of N_TIMES times per span. The loss of a token is the mean of the squared error over its
    channels, as that of `Flow`.

    Attributes:
        eta: how much of the noise a step of decoding renews: 0 none, so that the noise to begin with decides all
            (DDIM); 1 as much as the chain of DDPM.
        steps: of decoding, unless the request says otherwise.
    """

    kind: Literal["ddpm"] = "ddpm"
    weight: float = Field(default=1.0, gt=0)
    eta: float = Field(default=1.0, ge=0, le=1)
    steps: int = Field(default=50, ge=1, le=N_TIMES)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False
    continuous: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"temperature", "top_k", "top_p"})

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mix every vector with keyed noise, at the time of its span."""
        assert targets.values is not None
        uniform = keyed_uniform(targets.noise_keys, stream("ddpm/time"), targets.span_numbers)
        place = np.floor(uniform * N_TIMES).astype(np.int64)[targets.span_index]
        kept = _schedule().alphas_cumprod[torch.from_numpy(place)][:, None]
        noise = noise_of(targets, "ddpm/noise")
        mixed = kept.sqrt() * targets.values + (1 - kept).sqrt() * noise
        times = torch.from_numpy(place / N_TIMES).float()
        return Corrupted(
            targets.token_ids, np.ones(len(place), dtype=np.float32), values=mixed, times=times, labels=noise
        )

    def loss(
        self,
        logits: Float[Tensor, "M W"],
        labels: Int[Tensor, "M"] | Float[Tensor, "M C"],
        weights: Float[Tensor, "M"],
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the sum of the weighted mean squared errors; `z_loss` does not apply."""
        return squared_error(logits, labels, weights)

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Int[Tensor, "K"] | None = None) -> SpanState:
        """Open a span of `length` vectors, all noise until the first step."""
        assert kept is None, "a span of vectors is made whole"
        solver = copy.copy(_schedule())
        solver.set_timesteps(min(steps or self.steps, N_TIMES))
        return SolverState(torch.full((length,), mask_id), 0, len(solver.timesteps), solver=solver)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span: its vectors see each other."""
        return state.token_ids

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows:
        """Return the whole span at its present time."""
        assert isinstance(state, SolverState)
        n, time = len(state.token_ids), float(state.solver.timesteps[state.step]) / N_TIMES
        return ContinuousRows(torch.arange(n), values_or_noise(state, channels, draw), torch.full((n,), time))

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R *W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Take the noise that is predicted away, and as much of it as the next time has back in."""
        assert isinstance(state, SolverState)
        channels, step = logits.shape[-1], state.step + 1
        values = values_or_noise(state, channels, draw)
        renewed = draw.normal(step, torch.arange(len(values)), channels) if self.eta else None
        time = int(state.solver.timesteps[state.step])
        values = state.solver.step(logits, time, values, eta=self.eta, variance_noise=renewed, return_dict=False)[0]
        return replace(state, values=values, step=step, done=step == state.n_steps)


@lru_cache(maxsize=1)
def _schedule() -> Any:
    return diffusion_schedule(N_TIMES)
