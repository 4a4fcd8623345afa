"""Lookup-free quantization: a code is the signs of a vector's channels."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.codecs.quantizer import Quantized, Quantizer, along_channels, mean_per_item


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LFQConfig:
    """Lookup-free quantization: one bit per channel.

    Attributes:
        bits: channels; the codebook has 2^bits codes.
        temperature: of the probabilities of which the entropy is taken; the lower, the nearer to 0 a channel must be
            for it to count as undecided.
    """

    kind: Literal["lfq"] = "lfq"
    bits: int = Field(default=6, ge=1, le=24)
    temperature: float = Field(default=1.0, gt=0)

    def build(self) -> "LFQ":
        """Return the quantizer."""
        return LFQ(self)


class LFQ(Quantizer):
    """The sign of each channel, -1 at 0; the codebook is every corner of a cube, and nothing is learnt.

    Two losses keep the encoder decided and the codes in use. `commitment` is the mean squared distance to the corner.
    `entropy` is the mean entropy of p(code | vector) minus the entropy of its mean over all vectors of the call, in
    nats, where p falls off with the squared distance to the corner over the temperature. p is a product over channels,
    which makes the first entropy a sum over bits and the cost of both linear in `bits`.

    Source: MAGVIT-v2 (Yu et al. 2023), arXiv:2310.05737, section 3.1. Deviation: the entropy of the mean is the sum of
    the entropies of each bit's mean, its upper bound, reached where the bits are independent over vectors; the paper
    sums over the codes. It is taken over one micro-batch, not over all of a step.
    """

    loss_terms = ("commitment", "entropy")
    place_values: Int[Tensor, "D"]

    def __init__(self, config: LFQConfig) -> None:
        super().__init__()
        self.dim, self.codebook_size = config.bits, 2**config.bits
        self.temperature = config.temperature
        self.register_buffer("place_values", 2 ** torch.arange(config.bits), persistent=False)

    @property
    def residual_scale(self) -> float:
        """A half: from [-2, 2], signs leave [-1, 1]."""
        return 0.5

    def choose(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Take and number the signs."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            positive = latents > 0
            codes = (positive * along_channels(self.place_values, latents)).sum(1)
            corners = positive * 2.0 - 1.0
            commitment = mean_per_item(F.mse_loss(latents, corners, reduction="none")).sum()
            losses = {"commitment": commitment, "entropy": self._entropy_penalty(latents) * len(latents)}
            return Quantized(latents + (corners - latents).detach(), codes, losses)

    def code_vectors(self, codes: Int[Tensor, "B *S"]) -> Float[Tensor, "B D *S"]:
        """Read a code as a binary number."""
        return (codes[:, None] // along_channels(self.place_values, codes[:, None]) % 2) * 2.0 - 1.0

    def _entropy_penalty(self, latents: Float[Tensor, "B D *S"]) -> Float[Tensor, ""]:
        # exp(-(z - 1)^2 / T) against exp(-(z + 1)^2 / T): the squares cancel.
        logits = 4 * latents / self.temperature
        per_vector = _bit_entropy(logits).sum(1).mean()
        mean = torch.sigmoid(logits).transpose(0, 1).flatten(1).mean(1)
        return per_vector - _bit_entropy(torch.logit(mean, eps=1e-6)).sum()


def _bit_entropy(logits: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Return the entropy in nats of bits that are 1 with probability sigmoid(logits)."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)
