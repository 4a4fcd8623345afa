"""Settings of a training run: what every task shares, and what training the model adds."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from omniform.data.mixture import DataConfig
from omniform.errors import OmniformError
from omniform.modeling.config import STRICT, ModelConfig
from omniform.modeling.generation_config import SamplingSettings

# A run's name is a folder's: not hidden, and never ".." or a path.
NAME = r"^\w[\w.-]*$"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """AdamW (arXiv:1711.05101), its learning rate over the steps, and the average of the weights.

    Attributes:
        lr: peak learning rate.
        weight_decay: applied to parameters of two or more axes only.
        schedule: "cosine" (arXiv:1608.03983, one period) or "wsd": constant, then a linear decay (arXiv:2404.06395).
        warmup_steps: steps of linear rise from 0 to `lr`.
        decay_fraction: last fraction of all steps in which "wsd" decays.
        final_lr_fraction: fraction of `lr` at which the schedule ends.
        clip_grad_norm: L2 norm over all parameters to which gradients are clipped; null clips nothing.
        ema_decay: decay per step of the exponential moving average of the weights, which starts as a copy of them,
            so it needs no bias correction; null keeps none.
        skip_limit: steps in a row with a gradient that is not finite after which training stops.
    """

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    ema_decay: float | None = Field(default=0.999, ge=0, lt=1)
    skip_limit: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _check_betas(self) -> "OptimConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}, expected two numbers in [0, 1)")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """How a step is carried out; apart from `precision`, it may change when a run is resumed.

    Attributes:
        zero_stage: what DeepSpeed ZeRO (arXiv:1910.02054) shards over ranks: 0 nothing, 1 optimizer state,
            2 gradients too, 3 weights too.
        precision: "fp32"; "bf16_autocast": fp32 weights, bf16 matrix products; "bf16": bf16 weights with an fp32
            master copy; "auto": bf16_autocast where the hardware multiplies bf16, else fp32.
        micro_batch_rows: most rows of one forward pass of one rank.
    """

    zero_stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["auto", "fp32", "bf16_autocast", "bf16"] = "auto"
    micro_batch_rows: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _check_stage(self) -> "EngineConfig":
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision is bf16 at zero_stage 0, which keeps no fp32 master weights and does not converge as fp32 "
                "does: choose precision bf16_autocast, or zero_stage 1, 2 or 3"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written, in steps, and how many of the newest are kept."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """How often metrics and samples are written, in steps; `samples_every` 0 writes no samples."""

    every: int = Field(default=10, ge=1)
    samples_every: int = Field(default=0, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FitConfig:
    """What the training loop needs to know of any run; the configuration of each task extends it.

    Attributes:
        name: of the run; its folder is runs/NAME unless given.
        seed: of the initial weights and of everything random.
        steps: optimizer steps of the whole run.
        rows_per_step: rows of one optimizer step over all ranks and micro-batches.
    """

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    rows_per_step: int = Field(default=8, ge=1)
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_steps(self) -> "FitConfig":
        if self.optim.warmup_steps >= self.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, expected fewer than steps = {self.steps}: "
                "lower the one or raise the other"
            )
        return self

    def accumulation(self, world_size: int) -> int:
        """Return the number of micro-batches of each rank in a step.

        Raises:
            OmniformError: the rows of a step do not divide evenly.
        """
        if self.rows_per_step % world_size:
            raise OmniformError(
                f"rows_per_step is {self.rows_per_step}, expected a multiple of the number of processes, {world_size}: "
                "change one of them"
            )
        return -(-self.rows_per_step // (world_size * self.engine.micro_batch_rows))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig(FitConfig):
    """Training of the unified model; a row holds `data.row_length` tokens.

    Attributes:
        tokenizers: folder of the trained tokenizer of each modality, text among them.
        generation: default sampling settings by modality, stored with the model.
        cache_dir: where the tokens of the data are kept; "tokens" in the run folder unless given.
    """

    model: ModelConfig
    tokenizers: dict[str, Path]
    data: DataConfig
    generation: dict[str, SamplingSettings] = Field(default_factory=dict)
    cache_dir: Path | None = None
