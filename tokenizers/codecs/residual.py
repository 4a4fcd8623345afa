"""Residual quantization: several codes at each place, each for what the ones before it left."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.lfq import LFQConfig
from omniform.tokenizers.codecs.quantizer import Quantized, Quantizer, along_channels
from omniform.tokenizers.codecs.vq import VQEMAConfig


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ResidualConfig:
    """Residual quantization.

    Attributes:
        depth: codes at each place.
        base: the quantizer that chooses each of them.
        shared: one codebook for all depths (RQ-VAE); otherwise each depth learns one of its own (SoundStream). Codes
            are of one range either way.
    """

    kind: Literal["residual"] = "residual"
    depth: int = Field(default=2, ge=2)
    base: Annotated[FSQConfig | LFQConfig | VQEMAConfig, Field(discriminator="kind")] = VQEMAConfig()
    shared: bool = True

    def build(self) -> "Residual":
        """Return the quantizer."""
        if self.shared:
            return Residual(self.base.build(), self.depth)
        return SeparateResidual([self.base.build() for _ in range(self.depth)])


class Residual(Quantizer):
    """Quantize, then what that left, and so on; the code vector of a place is the sum.

    All depths share the codebook of `base`, so their codes are of one range. A learnt codebook holds vectors of every
    size; a fixed one is made smaller by `base.residual_scale` from depth to depth.

    Source: RQ-VAE (Lee et al. 2022), arXiv:2203.01941, section 3.1, whose commitment sums over the depths as all losses
    do here; SoundStream (Zeghidour et al. 2021), arXiv:2107.03312, algorithm 1. A learnt codebook is updated once per
    depth in every call; with a fixed one, the losses of a depth are in units of its scale.
    """

    def __init__(self, base: Quantizer, depth: int) -> None:
        super().__init__()
        self.base, self.depth = base, depth
        self.dim, self.codebook_size, self.loss_terms = base.dim, base.codebook_size, base.loss_terms

    def at_depth(self, place: int) -> Quantizer:
        """Return the quantizer of a depth, 0 the coarsest."""
        return self.base

    def bound(self, latents: Float[Tensor, "B D *S"]) -> Float[Tensor, "B D *S"]:
        """Bound as the coarsest does, once."""
        return self.at_depth(0).bound(latents)

    def choose(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Choose a code for the latents, then for what its vector leaves of them, `depth` times in all."""
        left, codes, losses = latents.float(), [], dict.fromkeys(self.loss_terms, latents.new_zeros(()))
        for place in range(self.depth):
            scale = self._scale(place, left)
            quantized = self.at_depth(place).choose(left / scale)
            left = left - quantized.latents.detach() * scale
            codes.append(quantized.codes)
            losses = {term: losses[term] + loss for term, loss in quantized.losses.items()}
        return Quantized(latents - left.detach(), torch.stack(codes, -1), losses)

    def code_vectors(self, codes: Int[Tensor, "B *S Q"]) -> Float[Tensor, "B D *S"]:
        """Add up the vectors of the codes at each place; with fewer codes than `depth`, of the coarsest."""
        vectors = [self.at_depth(place).code_vectors(chosen) for place, chosen in enumerate(codes.unbind(-1))]
        return sum(
            (vector * self._scale(place, vector) for place, vector in enumerate(vectors)),
            torch.zeros_like(vectors[0]),
        )

    def _scale(self, place: int, like: Float[Tensor, "B D *S"]) -> float | Float[Tensor, "D *_"]:
        scale = self.at_depth(place).residual_scale
        return scale**place if isinstance(scale, float) else along_channels(scale**place, like)


class SeparateResidual(Residual):
    """Residual quantization in which every depth has a quantizer of its own.

    Source: SoundStream (Zeghidour et al. 2021), arXiv:2107.03312, section III-C.
    """

    def __init__(self, bases: list[Quantizer]) -> None:
        super().__init__(bases[0], len(bases))
        self.finer = nn.ModuleList(bases[1:])

    def at_depth(self, place: int) -> Quantizer:
        """Return the quantizer of a depth, 0 the coarsest."""
        finer = self.finer[place - 1] if place else self.base
        assert isinstance(finer, Quantizer)
        return finer
