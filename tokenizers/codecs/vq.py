"""Vector quantization: a learnt codebook that follows the encoder."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.kernels.keyed_noise import keyed_permutation, stream
from omniform.tokenizers.codecs.quantizer import Quantized, Quantizer, mean_per_item


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class VQEMAConfig:
    """A learnt codebook.

    Attributes:
        codebook_size: number of codes.
        dim: channels of a code vector.
        decay: of the moving averages of how often and for what a code is used.
        restart_below: a code used by fewer vectors per update than this, on the moving average, is dead.
    """

    kind: Literal["vq_ema"] = "vq_ema"
    codebook_size: int = Field(default=64, ge=2)
    dim: int = Field(default=16, ge=1)
    decay: float = Field(default=0.98, gt=0, lt=1)
    restart_below: float = Field(default=1.0, gt=0)

    def build(self) -> "VQEMA":
        """Return the quantizer."""
        return VQEMA(self)


class VQEMA(Quantizer):
    """The nearest vector of a codebook whose entries are moving averages of the vectors that chose them.

    A dead code is set on a vector of the current batch before the search, so the first batch initialises the whole
    codebook. All ranks keep the same codebook: they share their sums, and rank 0 offers the vectors for dead codes.

    Source: VQ-VAE (van den Oord et al. 2017), arXiv:1711.00937, appendix A.1; restart of dead codes: Jukebox (Dhariwal
    et al. 2020), arXiv:2005.00341, section 3.1. Deviation: a restarted code's average use is set to `restart_below`,
    which gives it time to be chosen.
    """

    loss_terms = ("commitment",)
    codebook: Float[Tensor, "N D"]
    average_use: Float[Tensor, "N"]
    average_sum: Float[Tensor, "N D"]
    n_updates: Int[Tensor, ""]

    def __init__(self, config: VQEMAConfig) -> None:
        super().__init__()
        self.codebook_size, self.dim = config.codebook_size, config.dim
        self.decay, self.restart_below = config.decay, config.restart_below
        self.register_buffer("codebook", torch.zeros(config.codebook_size, config.dim))
        self.register_buffer("average_use", torch.zeros(config.codebook_size))
        self.register_buffer("average_sum", torch.zeros(config.codebook_size, config.dim))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    def choose(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Take the nearest code vectors; in training mode move the codebook towards what chose them."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            vectors = latents.detach().movedim(1, -1).reshape(-1, self.dim)  # (N, D)
            if self.training:
                self._restart_dead_codes(vectors)
            choice = self.nearest(vectors)
            codes = choice.view(len(latents), *latents.shape[2:])
            chosen = self.code_vectors(codes)
            if self.training:
                self._follow(vectors, choice)
            commitment = mean_per_item(F.mse_loss(latents, chosen, reduction="none")).sum()
            return Quantized(latents + (chosen - latents).detach(), codes, {"commitment": commitment})

    def code_vectors(self, codes: Int[Tensor, "B *S"]) -> Float[Tensor, "B D *S"]:
        """Look the codes up."""
        return self.codebook[codes].movedim(-1, 1)

    def nearest(self, vectors: Float[Tensor, "M D"]) -> Int[Tensor, "M"]:
        """Return the codes whose vectors have the least Euclidean distance."""
        return (self.codebook.square().sum(1) - 2 * vectors @ self.codebook.T).argmin(1)

    def _restart_dead_codes(self, vectors: Float[Tensor, "M D"]) -> None:
        order = keyed_permutation(len(vectors), stream("dead code restart"), int(self.n_updates))
        offered = vectors[torch.from_numpy(order).to(vectors.device)]
        offered = offered.repeat(-(-self.codebook_size // len(offered)), 1)[: self.codebook_size]
        if dist.is_initialized():
            dist.broadcast(offered, 0)
        # Vectors that are not finite come from a step that the trainer will skip: learn nothing from them.
        dead = ((self.average_use < self.restart_below) & offered.isfinite().all(1))[:, None]
        use = self.average_use.new_tensor(self.restart_below)
        self.average_use.copy_(torch.where(dead[:, 0], use, self.average_use))
        self.average_sum.copy_(torch.where(dead, offered * use, self.average_sum))
        self.codebook.copy_(torch.where(dead, offered, self.codebook))

    def _follow(self, vectors: Float[Tensor, "M D"], choice: Int[Tensor, "M"]) -> None:
        use = torch.zeros_like(self.average_use).index_add_(0, choice, torch.ones_like(vectors[:, 0]))
        total = torch.zeros_like(self.average_sum).index_add_(0, choice, vectors)
        if dist.is_initialized():
            dist.all_reduce(use)
            dist.all_reduce(total)
        if total.isfinite().all():
            self.average_use.lerp_(use, 1 - self.decay)
            self.average_sum.lerp_(total, 1 - self.decay)
            self.codebook.copy_(self.average_sum / self.average_use[:, None])
        self.n_updates += 1
