"""What a run will take, before it starts: parameters, memory, FLOPs, time and disk."""

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import nn

from omniform.errors import OmniformError
from omniform.modeling.config import TopK
from omniform.modeling.experts import ModalityExperts, TopKExperts
from omniform.modeling.model import UnifiedModel
from omniform.training.config import TrainConfig
from omniform.training.engine import resolve_precision
from omniform.training.optim import learning_rate_at

# Fraction of the speed of bare matrix products that training reaches; small models reach less.
ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True)
class Forecast:
    """Figures of a whole run; bytes are per process where memory is meant.

    Attributes:
        parameters: number by part of the model.
        active_parameters: how many of them a row goes through; all but the experts that are not its own.
        tokens_per_step: room in the rows of a step; packing fills most of it.
        flops_per_step: of all processes.
        matmul_flops: per second, of one process, measured on this machine.
        stages: a sentence on each stage of the run.
    """

    parameters: dict[str, int]
    active_parameters: int
    precision: str
    zero_stage: int
    world_size: int
    steps: int
    tokens_per_step: int
    state_bytes: int
    activation_bytes: int
    flops_per_step: float
    matmul_flops: float
    checkpoint_bytes: int
    disk_bytes: int
    free_disk: int
    stages: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Time of all steps, at ASSUMED_UTILISATION of the speed of matrix products."""
        speed = self.matmul_flops * ASSUMED_UTILISATION * self.world_size
        return self.steps * self.flops_per_step / speed

    def text(self, n_samples: int) -> str:
        """Return the forecast as lines for people."""
        parts = ", ".join(f"{name} {number:,}" for name, number in self.parameters.items())
        memory, total = self.state_bytes + self.activation_bytes, sum(self.parameters.values())
        active = "" if self.active_parameters == total else f", {self.active_parameters:,} of them active in a row"
        return "\n".join(
            [
                f"parameters  {total:,} ({parts}){active}",
                f"data        {n_samples:,} samples, {self.tokens_per_step:,} tokens per step, {self.steps:,} steps",
                *(f"stage       {line}" for line in self.stages),
                f"engine      ZeRO-{self.zero_stage}, {self.precision}, {self.world_size} process(es)",
                f"memory      {_size(memory)} per process: {_size(self.state_bytes)} weights, gradients and optimizer, "
                f"about {_size(self.activation_bytes)} activations; the first one also holds a copy of the weights",
                f"compute     {self.flops_per_step:.3g} FLOPs per step, {self.flops_per_step * self.steps:.3g} in all",
                f"time        {timedelta(seconds=round(self.seconds))}, at best, at {ASSUMED_UTILISATION:.0%} of the "
                f"{self.matmul_flops / 1e9:,.0f} GFLOP/s of matrix products measured here",
                f"disk        {_size(self.checkpoint_bytes)} per checkpoint, up to {_size(self.disk_bytes)} in all, "
                f"{_size(self.free_disk)} free",
            ]
        )


def forecast(model: UnifiedModel, config: TrainConfig, world_size: int, *, free_disk: int) -> Forecast:
    """Return the figures of a run, in well under ten seconds and without its weights.

    FLOPs of a step: 6 per active parameter and token, embedding tables apart, and 12 * layers * row_length * heads *
    head_dim per token for attention (PaLM, arXiv:2204.02311, appendix B), as if every token attended to its whole row
    and had its logits over the whole vocabulary. Memory of the state follows ZeRO (arXiv:1910.02054, section 5); that
    of activations is 34 bytes per token, dimension and layer (arXiv:2205.05198, equation 2, without its attention
    scores), of which 19 are the feed-forward layer's and count once for each expert of a row; twice that in fp32.

    Args:
        model: may be on the meta device.
        free_disk: bytes free where the run folder will be.

    Raises:
        OmniformError: the disk has no room for two checkpoints.
    """
    decoder = config.model.decoder
    per_row = decoder.experts.k if isinstance(decoder.experts, TopK) else 1
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    n = sum(parameters.values())
    layers = [m for m in model.modules() if isinstance(m, ModalityExperts | TopKExperts)]
    idle = [expert for layer in layers for expert in list(layer.experts)[layer.n_active :]]  # all of one size
    active = n - sum(p.numel() for expert in idle for p in expert.parameters())
    precision, stage = resolve_precision(config), config.engine.zero_stage
    tokens_per_step = config.rows_per_step * config.data.row_length
    attention_width = decoder.n_heads * decoder.dim_per_head
    looked_up = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    flops_per_token = 6 * (active - looked_up) + 12 * decoder.n_layers * attention_width * config.data.row_length
    micro_tokens = config.engine.micro_batch_rows * config.data.row_length
    width = 2 if precision == "fp32" else 1
    n_averages = 1 if config.optim.ema_decay is not None else 0
    checkpoint_bytes = 4 * n * (3 + n_averages)
    if free_disk < 2 * checkpoint_bytes:
        raise OmniformError(
            f"the disk of the run folder has {_size(free_disk)} free, but two checkpoints take "
            f"{_size(2 * checkpoint_bytes)}: make room, or choose an --out elsewhere"
        )
    return Forecast(
        parameters=parameters,
        active_parameters=active,
        precision=precision,
        zero_stage=stage,
        world_size=world_size,
        steps=config.steps,
        tokens_per_step=tokens_per_step,
        state_bytes=_state_bytes(n, stage, world_size, precision == "bf16", n_averages),
        activation_bytes=(15 + 19 * per_row) * micro_tokens * decoder.dim * decoder.n_layers * width,
        flops_per_step=float(flops_per_token * tokens_per_step),
        matmul_flops=_measure_matmul(micro_tokens, decoder.dim, decoder.ffn_dim, bf16=precision != "fp32"),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * (config.checkpoint.keep + 1) + 4 * n,
        free_disk=free_disk,
        stages=tuple(describe_stages(config)),
    )


def describe_stages(config: TrainConfig) -> list[str]:
    """Return a sentence on each stage: its steps, learning rate, and shares of the draws by source and task."""
    lines = []
    for place, (stage, first_step) in enumerate(zip(config.stages, config.stage_starts, strict=True)):
        last_step = first_step + config.stage_steps(place) - 1
        rates = " to ".join(f"{learning_rate_at(config, step):.2g}" for step in (first_step, last_step))
        sources = config.data.changed(stage.mixture).sources
        total = sum(source.weight for source in sources)
        shares = ", ".join(
            f"{source.label} {source.weight / total:.0%} ({', '.join(source.tasks)})"
            for source in sources
            if source.weight
        )
        lines.append(f"{stage.name}: steps {first_step + 1:,} to {last_step + 1:,}, learning rate {rates}; {shares}")
    return lines


def _state_bytes(n: int, stage: int, world_size: int, bf16: bool, n_averages: int) -> int:
    width = 2 if bf16 else 4
    weights = width * n // (world_size if stage == 3 else 1)
    gradients = width * n // (world_size if stage >= 2 else 1)
    # Beside moments and average, every stage but 0 keeps an fp32 master copy of its shard.
    optimizer = 4 * n * (2 + n_averages + (stage > 0)) // (world_size if stage else 1)
    return weights + gradients + optimizer


def _measure_matmul(n_rows: int, n_inner: int, n_columns: int, *, bf16: bool) -> float:
    """Return FLOP/s of a product of the decoder's feed-forward shape: the best of a few, over about 0.2 s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.ones(min(n_rows, 8192), n_inner, device=device, dtype=dtype)
    b = torch.ones(n_inner, n_columns, device=device, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * a.shape[0] * n_inner * n_columns / best


def _size(n_bytes: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            break
        n_bytes /= 1024  # type: ignore[assignment]
    return f"{n_bytes:.3g} {unit}"
