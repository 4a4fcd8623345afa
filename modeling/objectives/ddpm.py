"""Denoising diffusion: a span of vectors is noise that the prediction of its noise turns into data, step by step.

Sources: DDPM (arXiv:2006.11239) with the cosine schedule of arXiv:2102.09672, in one decoder with text as in
Transfusion (arXiv:2408.11039); DDIM (arXiv:2010.02502) for fewer steps. Here t = 0 is data and t = 1 is noise.
"""

import copy
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.objectives.base import Corrupted, Draw, SpanState, TargetSpans
from omniform.modeling.objectives.solved import Solved, SolverState, ddim_scheduler, noise_of

N_TIMES = 1000  # of the chain in training
FIRST_TIME = 980  # of decoding: later ones hold hardly any data to tell from noise, and divide by nearly nothing
MOST_STEPS = 250


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Ddpm(Solved):
    """Noise prediction along x_t = sqrt(a_t) * data + sqrt(1 - a_t) * noise, where sqrt(a_t) is nearly cos(pi t / 2).

    Training draws one of N_TIMES times per span.

    Attributes:
        eta: how much of the noise a step of decoding renews: 0 none, so that the noise to begin with decides all
            (DDIM); 1 as much as the chain of DDPM.
        steps: of decoding, unless the request says otherwise, at most MOST_STEPS: every (N_TIMES // steps)-th time from
            FIRST_TIME down, which are a few more or less where that rounds.
    """

    kind: Literal["ddpm"] = "ddpm"
    eta: float = Field(default=1.0, ge=0, le=1)
    steps: int = Field(default=50, ge=1, le=MOST_STEPS)

    bidirectional: ClassVar[bool] = True

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mix every vector with keyed noise, at the time of its span."""
        assert targets.values is not None
        uniform = keyed_uniform(targets.noise_keys, stream("ddpm/time"), targets.span_numbers)
        place = np.floor(uniform * N_TIMES).astype(np.int64)[targets.span_index]
        noise, times = noise_of(targets, "ddpm/noise"), torch.from_numpy(place / N_TIMES).float()
        mixed = self.mixed(targets.values, noise, times)
        return Corrupted(
            targets.token_ids, np.ones(len(place), dtype=np.float32), values=mixed, times=times, labels=noise
        )

    def mixed(
        self, data: Float[Tensor, "M C"], noise: Float[Tensor, "M C"], times: Float[Tensor, "M"]
    ) -> Float[Tensor, "M C"]:
        """Return what data has become by its time, of those of the chain, with this noise."""
        of_data = _chain().alphas_cumprod[(times * N_TIMES).round().long()][:, None]
        return of_data.sqrt() * data + (1 - of_data).sqrt() * noise

    def scheduler(self, steps: int | None) -> Any:
        """Return diffusers' DDIM scheduler at the beginning of its steps."""
        scheduler = copy.copy(_chain())
        scheduler.set_timesteps(min(steps or self.steps, MOST_STEPS))
        # Its own spacings begin at pure noise, which divides by nearly nothing, or too late.
        scheduler.timesteps = torch.arange(FIRST_TIME, -1, -(N_TIMES // scheduler.num_inference_steps))
        return scheduler

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
        values = self.present(state, channels, draw)
        renewed = draw.normal(step, torch.arange(len(values)), channels) if self.eta else None
        time = int(state.solver.timesteps[state.step])
        values = state.solver.step(logits, time, values, eta=self.eta, variance_noise=renewed, return_dict=False)[0]
        return self.advanced(state, values, state.solver)


@lru_cache(maxsize=1)
def _chain() -> Any:
    return ddim_scheduler(N_TIMES)
