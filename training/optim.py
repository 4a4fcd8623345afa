"""AdamW and Muon that also keep the average of the weights, their parameter groups, and the learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from omniform.errors import OmniformError
from omniform.training.config import FitConfig, OptimConfig, ScheduleConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def learning_rate_at(config: FitConfig, step: int) -> float:
    """Return the learning rate of a step of the run: by the schedule of its stage, over the stage's steps, where it has
    one of its own; else by that of `optim`, over all steps.

    So one "wsd" in `optim` decays once, at the end of the run, whatever the stages; one in a stage at the stage's end.
    """
    place = config.stage_at(step)
    own = None if place is None else config.stages[place].learning_rate
    if place is None or own is None:
        return learning_rate(config.optim, step, config.steps)
    return learning_rate(own, step - config.stage_starts[place], config.stage_steps(place))


def learning_rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` in [0, steps).

    Linear rise over `warmup_steps`, reaching `lr` with its last step; then cosine decay to the final rate, or constant,
    or constant and a linear decay over the last `decay_fraction` of the steps.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    final = config.final_lr_fraction
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
        return config.lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
    decay_steps = min(steps - config.warmup_steps, max(1, round(config.decay_fraction * steps)))
    progress = max(0.0, (step - (steps - decay_steps)) / decay_steps)
    return config.lr * (1 - (1 - final) * progress)


class AveragingAdamW(torch.optim.AdamW):
    """torch's fused AdamW whose state holds, beside the moments, the moving average of the weights.

    As optimizer state the average is sharded, stored and restored exactly as the moments are, at every ZeRO stage;
    a skipped step leaves it alone.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        trainable = [p for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self.ema_decay = config.ema_decay

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the state kept per parameter, each of the parameter's shape."""
        return MOMENTS if self.ema_decay is None else (*MOMENTS, EMA)

    @property
    def n_updates(self) -> int:
        """Updates made so far: the exponent of the bias correction, one number for all parameters."""
        return int(next(iter(self.state.values()))["step"])

    @n_updates.setter
    def n_updates(self, value: int) -> None:
        for state in self.state.values():
            state["step"].fill_(value)

    def initialise_state(self, parameters: Iterable[Tensor]) -> None:
        """Create the state of `parameters` before the first step, as torch would at it; the average is a copy."""
        for p in parameters:
            self.state[p]["step"] = torch.zeros((), device=p.device)
            for key in MOMENTS:
                self.state[p][key] = torch.zeros_like(p)
            if self.ema_decay is not None:
                self.state[p][EMA] = p.detach().clone()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and its average."""
        super().step(closure)
        self._average()

    def _average(self) -> None:
        if self.ema_decay is None:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p][EMA].lerp_(p, 1 - self.ema_decay)


class AveragingMuon(AveragingAdamW):
    """Muon (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon) for the weights of linear layers, else AdamW.

    An update of a matrix is its momentum, made nearly orthogonal by Newton-Schulz steps, and scaled to the size of
    AdamW's updates (arXiv:2502.16982), so that both follow one learning rate. torch's own Muon computes it. Deviation:
    a matrix whose gradient is zero throughout, such as an expert's whose modality a batch lacks, only decays, for
    Newton-Schulz would bring what is left of its momentum back to full size at every such step.

    It needs whole matrices, as they are at ZeRO stage 0 alone. The momentum is kept as `exp_avg`, so that checkpoints
    look like AdamW's; `exp_avg_sq` of a matrix stays zero.

    Raises:
        OmniformError: the module has no linear layer to train.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        super().__init__(module, config)
        layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
        self._matrices = [layer.weight for layer in layers if layer.weight.requires_grad]
        if not self._matrices:
            raise OmniformError(
                f"optim.kind is muon, but {type(module).__name__} has no linear layer to train, whose weights alone "
                "Muon updates: set optim.kind to adamw"
            )
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            eps=config.eps,
            adjust_lr_fn="match_rms_adamw",
        )

    def initialise_state(self, parameters: Iterable[Tensor]) -> None:
        """Create the state of `parameters` before the first step; Muon's momentum is the `exp_avg` of its matrices."""
        super().initialise_state(parameters)
        for p in self._matrices:
            self._muon.state[p]["momentum_buffer"] = self.state[p]["exp_avg"]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group."""
        super().set_lr(lr)
        for group in self._muon.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, and its average."""
        gradients = [p.grad for p in self._matrices]
        for group in self._muon.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.any():
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    self.state[p]["exp_avg"].mul_(group["momentum"])
                    p.grad = None
        self._muon.step()
        for p, gradient in zip(self._matrices, gradients, strict=True):
            p.grad = None  # what is done is not AdamW's
            if gradient is not None:
                self.state[p]["step"] += 1
        torch.optim.AdamW.step(self, closure)
        for p, gradient in zip(self._matrices, gradients, strict=True):
            p.grad = gradient
        self._average()


OPTIMIZERS = {"adamw": AveragingAdamW, "muon": AveragingMuon}
