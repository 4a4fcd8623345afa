"""Flow matching: a span of vectors is noise that a learnt velocity carries to data.

Sources: flow matching (arXiv:2210.02747) on the straight paths of rectified flow (arXiv:2209.03003), with the times and
the shift of Stable Diffusion 3 (arXiv:2403.03206), in one decoder with text as in BAGEL (arXiv:2505.14683) and Show-o2
(arXiv:2506.15564). Here t = 0 is data and t = 1 is noise.
"""

import copy
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_normal, keyed_uniform, stream
from omniform.modeling.objectives.base import ContinuousRows, Corrupted, Draw, Objective, SpanState, TargetSpans


def shifted(t: npt.NDArray[np.float64], shift: float) -> npt.NDArray[np.float64]:
    """Return the time at which an item of `shift` ** 2 times as many pixels has lost as much as one has at time t.

    Source: arXiv:2403.03206, equation 23.
    """
    return shift * t / (1 + (shift - 1) * t)


@plain_dataclass(frozen=True)
class SolverState(SpanState):
    """A span on its way from noise to data.

    Attributes:
        solver: a scheduler of diffusers, which has done `step` of its steps.
    """

    solver: Any = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Flow(Objective):
    """Velocity prediction along x_t = (1 - t) * data + t * noise, whose velocity is noise - data.

    Training draws one t per span. The loss of a token is the mean over its channels of the squared error.

    Attributes:
        times: how t is drawn in training: "uniform", or "logit_normal", the logistic function of a normal number with
            `mean` and `std`, which prefers the middle (arXiv:2403.03206, section 3.1).
        time_shift: moves the times of training and of the solver towards noise, as more pixels of one content need;
            see `shifted`. 1 moves nothing.
        solver: of the differential equation: "euler" takes one forward pass a step; "heun" two, but for its last step
            (arXiv:2206.00364, algorithm 1).
        steps: of the solver, unless the request says otherwise.
    """

    kind: Literal["flow"] = "flow"
    weight: float = Field(default=1.0, gt=0)
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    time_shift: float = Field(default=1.0, gt=0)
    solver: Literal["euler", "heun"] = "euler"
    steps: int = Field(default=25, ge=1)

    bidirectional: ClassVar[bool] = True
    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False
    continuous: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"temperature", "top_k", "top_p"})

    def corrupt(self, targets: TargetSpans, mask_id: int) -> Corrupted:
        """Mix every vector with keyed noise, at the time of its span."""
        assert targets.values is not None
        keys = (targets.noise_keys, stream("flow/time"), targets.span_numbers)
        if self.times == "uniform":
            times = keyed_uniform(*keys)
        else:
            times = 1 / (1 + np.exp(-(self.mean + self.std * keyed_normal(*keys))))
        t = torch.from_numpy(shifted(times, self.time_shift)[targets.span_index]).float()
        noise = noise_of(targets, "flow/noise")
        mixed = torch.lerp(targets.values, noise, t[:, None])
        weights = np.ones(len(t), dtype=np.float32)
        return Corrupted(targets.token_ids, weights, values=mixed, times=t, labels=noise - targets.values)

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
        solver = self._solver(steps or self.steps)
        return SolverState(torch.full((length,), mask_id), 0, len(solver.timesteps), solver=solver)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span: its vectors see each other."""
        return state.token_ids

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows:
        """Return the whole span at its present time."""
        assert isinstance(state, SolverState)
        n = len(state.token_ids)
        time = float(state.solver.timesteps[state.step]) / state.solver.config.num_train_timesteps
        return ContinuousRows(torch.arange(n), values_or_noise(state, channels, draw), torch.full((n,), time))

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Follow the velocities that are given to the next time of the solver."""
        assert isinstance(state, SolverState)
        solver = copy.copy(state.solver)
        values = values_or_noise(state, logits.shape[-1], draw)
        values = solver.step(logits, solver.timesteps[state.step], values, return_dict=False)[0]
        step = state.step + 1
        return replace(state, solver=solver, values=values, step=step, done=step == state.n_steps)

    def _solver(self, steps: int) -> Any:
        # diffusers takes seconds to import.
        from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

        sigmas = torch.from_numpy(shifted(np.linspace(1, 0, steps + 1), self.time_shift)).float()
        solver: Any
        if self.solver == "euler":
            solver = FlowMatchEulerDiscreteScheduler()
            solver.set_timesteps(sigmas=sigmas[:-1].tolist())
        else:
            solver = FlowMatchHeunDiscreteScheduler()
            solver.set_timesteps(steps)
            # Its own times end at 1 / 1000 of noise, and it cannot be given others.
            twice = sigmas[1:-1].repeat_interleave(2)
            solver.sigmas = torch.cat([sigmas[:1], twice, sigmas[-1:]])
            solver.timesteps = solver.sigmas[:-1] * solver.config.num_train_timesteps
        solver.set_begin_index(0)
        return solver


def squared_error(
    outputs: Float[Tensor, "M C"], labels: Float[Tensor, "M C"], weights: Float[Tensor, "M"]
) -> Float[Tensor, ""]:
    """Return the sum over rows of the weighted mean squared error of their numbers; weight 0 adds exactly 0."""
    losses = (outputs.float() - labels).square().mean(dim=-1)
    return (losses * weights).where(weights > 0, 0.0).sum()


def diffusion_schedule(n_times: int) -> Any:
    """Return diffusers' DDIM scheduler of a chain of `n_times` with the cosine schedule, for noise prediction.

    Its times of decoding leave out the last one, at which hardly any data is left to tell noise from.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        n_times, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )


def noise_of(targets: TargetSpans, name: str) -> Float[Tensor, "M C"]:
    """Return standard normal noise for every number of some spans, keyed by sample, span, place and channel.

    Args:
        name: of this use of random numbers.
    """
    assert targets.values is not None
    spans, channels = targets.span_index, np.arange(targets.values.shape[-1])
    keys = (targets.noise_keys[spans, None], stream(name), targets.span_numbers[spans, None])
    return torch.from_numpy(keyed_normal(*keys, targets.positions[:, None], channels)).float()


def values_or_noise(state: SpanState, channels: int, draw: Draw) -> Float[Tensor, "N C"]:
    """Return the span's vectors; before the first step the noise, which keys alone decide."""
    if state.values is not None:
        return state.values
    return draw.normal(0, torch.arange(len(state.token_ids)), channels)
