"""DeepSpeed ZeRO behind a small face: the one file that imports deepspeed, and only when an engine is made.

State crosses this face as full fp32 tensors by parameter name, the same at every stage and world size; which calls of
DeepSpeed serve for that, and which do not, is in docs/decisions/0002-stage-neutral-checkpoints.md.
"""

import atexit
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from omniform.errors import OmniformError
from omniform.training.config import FitConfig
from omniform.training.optim import OPTIMIZERS

WEIGHTS = "weights"
_EXPECTED_NOTICES = ("You are using ZeRO with an untested optimizer", "OVERFLOW! Skipping step")


@dataclass(frozen=True)
class Update:
    """What an optimizer step did: the gradients' L2 norm before clipping, and whether it was skipped as not finite."""

    grad_norm: float
    skipped: bool


class Engine:
    """A module being trained by the ranks of one process group.

    Args:
        module: in fp32 and with the same weights on every rank; it belongs to the engine from here on.
        config: of the run; `engine`, `optim` and `rows_per_step` are read.

    Attributes:
        precision: what "auto" came to.
    """

    def __init__(self, module: nn.Module, config: FitConfig) -> None:
        self._library = deepspeed = _import_deepspeed()
        self.device = join_process_group()
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.accumulation = config.accumulation(self.world_size)
        self.stage, self.precision = config.engine.zero_stage, resolve_precision(config)
        self._module, self._optim = module, config.optim
        self._names = dict(module.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in self._names.items()}
        self._optimizer = OPTIMIZERS[config.optim.kind](module, config.optim)
        self._inner = _Autocast(module, self.device.type, enabled=self.precision != "fp32")
        self._deepspeed, *_ = deepspeed.initialize(
            model=self._inner,
            optimizer=self._optimizer,
            config=self._settings(config),
        )
        self._initialise_optimizer_state()

    def _settings(self, config: FitConfig) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": config.engine.micro_batch_rows,
            "gradient_accumulation_steps": self.accumulation,
            # At stage 0 gradients are clipped here, because DeepSpeed neither reports that norm nor checks it.
            "gradient_clipping": (config.optim.clip_grad_norm or 0.0) if self.stage else 0.0,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.precision == "bf16"},
            "steps_per_print": None,
        }

    def _initialise_optimizer_state(self) -> None:
        # DeepSpeed leaves this to the first step; stored state must be set, and a new run stored, before it.
        zero = self._deepspeed.optimizer
        if self.stage == 0:
            self._optimizer.initialise_state(p for p in self._names.values() if p.requires_grad)
        elif self.stage == 3:
            self._optimizer.initialise_state(zero.fp32_partitioned_groups_flat)
        else:
            self._optimizer.initialise_state(zero.single_partition_of_fp32_groups)
            zero._lazy_init_hp_params_optimizer_state()

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """Return the loss sums of one micro-batch."""
        return self._deepspeed(to_device(inputs, self.device))

    def new_gradient(self) -> Tensor:
        """Return zeros in place of the whole gradient, flat, to add what `gradient_of` returns to."""
        return torch.zeros(sum(p.numel() for p in self._names.values() if p.requires_grad), device=self.device)

    def gradient_of(self, term: str, factor: float) -> Tensor:
        """Return this rank's gradient of `factor` times a loss of the last `forward`, flat and in fp32.

        What `backward` adds up stays as it is. Not at stage 3, where weights are in parts.
        """
        trainable = [p for p in self._names.values() if p.requires_grad]
        loss = factor * self._inner.losses[term]
        found = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
        pairs = zip(found, trainable, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs])

    def norm_over_ranks(self, gradient: Tensor) -> float:
        """Return the norm of the mean of the ranks' gradients, which is overwritten with it."""
        if self.world_size > 1:
            dist.all_reduce(gradient)
            gradient /= self.world_size
        return float(gradient.norm())

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; over ranks they are averaged, over micro-batches summed."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, lr: float) -> Update:
        """Clip and update after the last micro-batch; all ranks skip together if any gradient is not finite."""
        self._optimizer.set_lr(lr)
        if self.stage == 0:
            update = self._check_and_clip()
            self._deepspeed.step()
            return update
        self._deepspeed.step()
        return Update(float(self._deepspeed.get_global_grad_norm()), bool(self._deepspeed.optimizer.overflow))

    def _check_and_clip(self) -> Update:
        # Gradients are already reduced here, so every rank comes to the same decision by itself.
        trainable = [p for p in self._names.values() if p.requires_grad]
        for p in trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # ZeRO updates a parameter without gradient too (weight decay, moments)
        norm = float(nn.utils.clip_grad_norm_(trainable, self._optim.clip_grad_norm or math.inf))
        if math.isfinite(norm):
            return Update(norm, skipped=False)
        for p in trainable:
            p.grad = None
        return Update(math.inf, skipped=True)

    # State, as full tensors by parameter name

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the optimizer's state per parameter, of each parameter's shape."""
        return self._optimizer.state_keys

    @property
    def n_updates(self) -> int:
        """Updates made so far, skipped steps not counted."""
        return self._optimizer.n_updates

    @n_updates.setter
    def n_updates(self, value: int) -> None:
        self._optimizer.n_updates = value

    def shapes(self, key: str = WEIGHTS) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that `read` yields, without collecting any."""
        return {n: self._shapes[n] for n, p in self._names.items() if p.requires_grad or key == WEIGHTS}

    def read(self, key: str = WEIGHTS) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, copy of the full fp32 tensor on the CPU) of every parameter that has `key`; collective.

        Args:
            key: "weights" (frozen parameters included) or one of `state_keys`.
        """
        for name, p in self._names.items():
            if p.requires_grad:
                yield name, self._read(p, key).detach().to("cpu", torch.float32, copy=True)
            elif key == WEIGHTS:
                with self._gathered(p):
                    yield name, p.detach().to("cpu", torch.float32, copy=True)

    def write(self, name: str, value: Tensor, key: str = WEIGHTS) -> None:
        """Set what `read` yields for one parameter; every rank must call it with the same full tensor."""
        p = self._names[name]
        value = value.to(self.device, torch.float32)
        if p.requires_grad:
            self._write(p, value, key)
        if key == WEIGHTS:
            # The copy that the forward pass reads; DeepSpeed's calls set the fp32 master only.
            with self._gathered(p), torch.no_grad():
                p.copy_(value)

    def buffers(self) -> dict[str, Tensor]:
        """Return the module's persistent buffers by name; not copies."""
        state = self._module.state_dict(keep_vars=True)
        return {name: t for name, t in state.items() if not isinstance(t, nn.Parameter)}

    def _read(self, p: Tensor, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return p if key == WEIGHTS else self._optimizer.state[p][key]
        return safe_get_full_fp32_param(p) if key == WEIGHTS else safe_get_full_optimizer_state(p, key)

    def _write(self, p: Tensor, value: Tensor, key: str) -> None:
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if self.stage == 0:
            if key != WEIGHTS:
                self._optimizer.state[p][key].copy_(value)
        elif self.stage < 3 and key == WEIGHTS:
            safe_set_full_fp32_param(p, value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(p, value, key)
        else:
            # safe_set_full_* fails at stage 3 where a size does not divide by the world size: set this rank's part.
            size = safe_get_local_fp32_param(p).numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            part = padded.narrow(0, size * self.rank, size)
            if key == WEIGHTS:
                safe_set_local_fp32_param(p, part)
            else:
                safe_set_local_optimizer_state(p, part, key)

    def _gathered(self, p: Tensor) -> Any:
        return self._library.zero.GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3)

    # Words between ranks

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a small CPU tensor over ranks, on the CPU."""
        if self.world_size == 1:
            return values.cpu()
        values = values.to(self.device, copy=True)
        dist.all_reduce(values)
        return values.cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in order of rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first_rank(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and return its result on every rank; its OmniformError is raised on every rank."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except OmniformError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def close(self) -> None:
        """Wait for the other ranks and free what the engine holds."""
        dist.barrier()
        self._deepspeed.destroy()


class _Autocast(nn.Module):
    """Runs the module under bf16 autocast, which also casts inputs to bf16 weights."""

    def __init__(self, module: nn.Module, device_type: str, *, enabled: bool) -> None:
        super().__init__()
        self.module, self.device_type, self.enabled = module, device_type, enabled
        self.losses: dict[str, Tensor] = {}

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            self.losses = self.module(inputs)
        # DeepSpeed hooks what it is given: a gradient of these alone would be taken for the step's.
        return {term: loss.clone() for term, loss in self.losses.items()}


def multiplies_bf16() -> bool:
    """Return whether the device that training would use multiplies bf16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(config: FitConfig) -> str:
    """Return the run's precision, "auto" decided by the hardware."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16_autocast" if multiplies_bf16() else "fp32"


def join_process_group() -> torch.device:
    """Join the launcher's processes, or make a group of this process alone; return this rank's device."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    world_size = os.environ.get("WORLD_SIZE", "1")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == world_size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: its name may resolve to nothing reachable
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(dist.destroy_process_group)
    return device


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return inputs of a micro-batch on `device`."""
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs.to(device)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch renamed collectives that DeepSpeed calls at stage 3, and parts that it loads with the Muon optimizer.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning)
    import deepspeed

    # Built with a compiler at first use, and a killed build leaves a lock on which later runs wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    if not logger.filters:
        logger.addFilter(lambda record: not any(text in record.getMessage() for text in _EXPECTED_NOTICES))
    return deepspeed
