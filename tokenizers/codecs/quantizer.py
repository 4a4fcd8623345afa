"""What every quantizer is: from vectors to codes and back."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class Quantized(NamedTuple):
    """What a quantizer makes of latents.

    Attributes:
        latents: the chosen code vectors; their gradient goes straight through to the input.
        codes: the chosen codes; residual quantization chooses several at each place, along the last axis.
        losses: the quantizer's `loss_terms` in their order, each summed over items.
    """

    latents: Float[Tensor, "B D H W"]
    codes: Int[Tensor, "B H W *Q"]
    losses: Mapping[str, Float[Tensor, ""]]


class Quantizer(nn.Module):
    """Chooses one of `codebook_size` vectors of `dim` channels at every place of a grid.

    Attributes:
        depth: codes at each place; more than one only in residual quantization.
        loss_terms: names of the losses that `forward` returns.
    """

    codebook_size: int
    dim: int
    depth: int = 1
    loss_terms: tuple[str, ...] = ()

    @property
    def residual_scale(self) -> float | Float[Tensor, "D 1 1"]:
        """How much smaller than the latents is what quantization leaves of them, at most; 1 where a codebook learns
        the sizes of all that it meets."""
        return 1.0

    def forward(self, latents: Float[Tensor, "B D H W"]) -> Quantized:
        """Quantize; in training mode also learn what is learnt without gradients."""
        return self.choose(self.bound(latents))

    def bound(self, latents: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """Bring latents into the range of the code vectors, where these are bounded; with gradients."""
        return latents

    @abstractmethod
    def choose(self, latents: Float[Tensor, "B D H W"]) -> Quantized:
        """Choose the code vector for latents of `bound`; in training mode learn as `forward` does."""

    @abstractmethod
    def code_vectors(self, codes: Int[Tensor, "B H W *Q"]) -> Float[Tensor, "B D H W"]:
        """Return the vectors of codes."""
