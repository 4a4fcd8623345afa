"""Flow matching: a span of vectors is noise that a learnt velocity carries to data.

Sources: flow matching (arXiv:2210.02747) on the straight paths of rectified flow (arXiv:2209.03003), with the times and
the shift of Stable Diffusion 3 (arXiv:2403.03206), in one decoder with text as in BAGEL (arXiv:2505.14683) and Show-o2
(arXiv:2506.15564). Here t = 0 is data and t = 1 is noise.
"""

import copy
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_normal, keyed_uniform, stream
from omniform.modeling.objectives.base import Corrupted, Draw, SpanState, TargetSpans
from omniform.modeling.objectives.solved import Solved, SolverState, flow_scheduler, noise_of


def shifted(t: npt.NDArray[np.float64], shift: float) -> npt.NDArray[np.float64]:
    """Return the time at which an item of `shift` ** 2 times as many pixels has lost as much as one has at time t.

    Source: arXiv:2403.03206, equation 23.
    """
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Flow(Solved):
    """Velocity prediction along x_t = (1 - t) * data + t * noise, whose velocity is noise - data.

    Training draws one t per span.

    Attributes:
        times: how t is drawn in training: "uniform", or "logit_normal", the logistic function of a normal number with
            `mean` and `std`, which prefers the middle (arXiv:2403.03206, section 3.1).
        time_shift: moves the times of training and of the solver towards noise, as more pixels of one content need;
            see `shifted`. 1 moves nothing.
        solver: of the differential equation: "euler" takes one forward pass a step; "heun" two, but for its last step
            (arXiv:2206.00364, algorithm 1).
        steps: of the solver, unless the request says otherwise.
        attention: within a span: "bidirectional", or "causal", where a row sees those before it alone, as the text
            does; Transfusion measures what that costs (arXiv:2408.11039, section 4.3).
    """

    kind: Literal["flow"] = "flow"
    times: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(default=1.0, gt=0)
    time_shift: float = Field(default=1.0, gt=0)
    solver: Literal["euler", "heun"] = "euler"
    steps: int = Field(default=25, ge=1)
    attention: Literal["bidirectional", "causal"] = "bidirectional"

    @property
    def bidirectional(self) -> bool:
        """Whether rows of such a span see their whole span."""
        return self.attention == "bidirectional"

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
        mixed = self.mixed(targets.values, noise, t)
        weights = np.ones(len(t), dtype=np.float32)
        return Corrupted(targets.token_ids, weights, values=mixed, times=t, labels=noise - targets.values)

    def step(
        self,
        state: SpanState,
        logits: Float[Tensor, "R *W"],
        first_id: int,
        end_id: int | None,
        mask_id: int,
        draw: Draw,
    ) -> SpanState:
        """Follow the velocities that are given to the next time of the solver."""
        assert isinstance(state, SolverState)
        solver = copy.copy(state.solver)
        values = self.present(state, logits.shape[-1], draw)
        values = solver.step(logits, solver.timesteps[state.step], values, return_dict=False)[0]
        return self.advanced(state, values, solver)

    def mixed(
        self, data: Float[Tensor, "M C"], noise: Float[Tensor, "M C"], times: Float[Tensor, "M"]
    ) -> Float[Tensor, "M C"]:
        """Return what lies between data and noise on a straight line."""
        return torch.lerp(data, noise, times[:, None])

    def scheduler(self, steps: int | None) -> Any:
        """Return diffusers' scheduler of the method at the beginning of its steps."""
        n_steps = steps or self.steps
        sigmas = torch.from_numpy(shifted(np.linspace(1, 0, n_steps + 1), self.time_shift)).float()
        return flow_scheduler(self.solver, sigmas)
