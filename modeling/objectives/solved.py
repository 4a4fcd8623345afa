"""What objectives share that learn to take noise out of vectors, step by step with a scheduler of diffusers."""

from abc import abstractmethod
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_normal, stream
from omniform.modeling.objectives.base import ContinuousRows, Draw, Kept, Objective, SpanState, TargetSpans


@plain_dataclass(frozen=True)
class SolverState(SpanState):
    """A span on its way from noise to data.

    Attributes:
        solver: a scheduler of diffusers, which has done `step` of its steps.
    """

    solver: Any = None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Solved(Objective):
    """A span whose rows are all at one time between data (0) and noise (1).

    In an edited span what is kept goes through the same times, mixed with the noise that the span began with, and is
    itself again at the end (RePaint, arXiv:2201.09865; deviation: no step is taken back to harmonise the two).

    The loss of a token is the mean over its channels of the squared error.
    """

    weight: float = Field(default=1.0, gt=0)

    corrupts: ClassVar[bool] = True
    shift: ClassVar[int] = 0
    commits: ClassVar[bool] = False
    continuous: ClassVar[bool] = True
    ignores: ClassVar[frozenset[str]] = frozenset({"temperature", "top_k", "top_p"})

    @abstractmethod
    def scheduler(self, steps: int | None) -> Any:
        """Return a scheduler of diffusers at the beginning of its steps; None takes as many as are configured."""

    def loss(
        self,
        logits: Float[Tensor, "M W"],
        labels: Int[Tensor, "M"] | Float[Tensor, "M C"],
        weights: Float[Tensor, "M"],
        z_loss: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return the sum of the weighted mean squared errors; `z_loss` does not apply."""
        losses = (logits.float() - labels).square().mean(dim=-1)
        return (losses * weights).where(weights > 0, 0.0).sum()

    def begin(self, length: int, steps: int | None, mask_id: int, kept: Kept | None = None) -> SpanState:
        """Open a span of `length` vectors, all noise until the first step."""
        solver = self.scheduler(steps)
        return SolverState(torch.full((length,), mask_id), 0, len(solver.timesteps), kept=kept, solver=solver)

    def inputs(self, state: SpanState, begin_id: int) -> Int[Tensor, "R"]:
        """The whole span: all its vectors move in every step."""
        return state.token_ids

    def vectors(self, state: SpanState, channels: int, draw: Draw) -> ContinuousRows:
        """Return the whole span at its present time."""
        values = self.present(state, channels, draw)
        return ContinuousRows(torch.arange(len(values)), values, torch.full((len(values),), self._time(state)))

    @abstractmethod
    def mixed(
        self, data: Float[Tensor, "M C"], noise: Float[Tensor, "M C"], times: Float[Tensor, "M"]
    ) -> Float[Tensor, "M C"]:
        """Return what data and noise are between their times, 0 and 1."""

    def present(self, state: SpanState, channels: int, draw: Draw) -> Float[Tensor, "N C"]:
        """Return the span's vectors as the next step finds them; before the first, noise that keys alone decide."""
        positions = torch.arange(len(state.token_ids))
        values = draw.normal(0, positions, channels) if state.values is None else state.values
        if state.kept is None:
            return values
        assert state.kept.values is not None
        times = torch.full((len(positions),), self._time(state))
        kept = self.mixed(state.kept.values, draw.normal(0, positions, channels), times)
        return torch.where(state.kept.wanted[:, None], values, kept)

    def advanced(self, state: SolverState, values: Float[Tensor, "N C"], solver: Any) -> SolverState:
        """Return the state after a step that led to `values`; after the last what is kept is as it was."""
        step = state.step + 1
        done = step == state.n_steps
        if done and state.kept is not None:
            assert state.kept.values is not None
            values = torch.where(state.kept.wanted[:, None], values, state.kept.values)
        return replace(state, solver=solver, values=values, step=step, done=done)

    def _time(self, state: SpanState) -> float:
        assert isinstance(state, SolverState)
        return float(state.solver.timesteps[state.step]) / state.solver.config.num_train_timesteps


def flow_scheduler(method: Literal["euler", "heun"], sigmas: Float[Tensor, "S"]) -> Any:
    """Return diffusers' scheduler of a method that follows velocities through the given times, from 1 to 0."""
    # diffusers takes seconds to import.
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    scheduler: Any
    if method == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    else:
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(len(sigmas) - 1)
        # Its own times end at 1 / 1000 of noise, and it cannot be given others.
        twice = sigmas[1:-1].repeat_interleave(2)
        scheduler.sigmas = torch.cat([sigmas[:1], twice, sigmas[-1:]])
        scheduler.timesteps = scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps
    scheduler.set_begin_index(0)
    return scheduler


def ddim_scheduler(n_times: int) -> Any:
    """Return diffusers' DDIM scheduler of a chain of `n_times` with the cosine schedule, for noise prediction."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(n_times, beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=True)


def noise_of(targets: TargetSpans, name: str) -> Float[Tensor, "M C"]:
    """Return standard normal noise for every number of some spans, keyed by sample, span, place and channel.

    Args:
        name: of this use of random numbers.
    """
    assert targets.values is not None
    spans, channels = targets.span_index, np.arange(targets.values.shape[-1])
    keys = (targets.noise_keys[spans, None], stream(name), targets.span_numbers[spans, None])
    return torch.from_numpy(keyed_normal(*keys, targets.positions[:, None], channels)).float()
