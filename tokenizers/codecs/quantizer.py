"""What every quantizer is: from vectors to codes and back."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from omniform.tokenizers.base import Continuous, Discrete


class Quantized(NamedTuple):
    """What a quantizer makes of latents.

    Attributes:
        latents: the chosen code vectors; their gradient goes straight through to the input.
        codes: the chosen codes; residual quantization chooses several at each place, along the last axis.
        losses: the quantizer's `loss_terms` in their order, each summed over items.
    """

    latents: Float[Tensor, "B D *S"]
    codes: Int[Tensor, "B *places"]
    losses: Mapping[str, Float[Tensor, ""]]


class Quantizer(nn.Module):
    """Chooses one of `codebook_size` vectors of `dim` channels at every place of a grid of any number of axes.

    Attributes:
        depth: codes at each place; more than one only in residual quantization.
        loss_terms: names of the losses that `forward` returns.
    """

    codebook_size: int
    dim: int
    depth: int = 1
    loss_terms: tuple[str, ...] = ()

    @property
    def representation(self) -> Discrete | Continuous:
        """What its tokens are; the codes of all depths are of one range."""
        return Discrete(self.codebook_size)

    @property
    def input_dim(self) -> int:
        """Channels of the latents that it takes."""
        return self.dim

    @property
    def residual_scale(self) -> float | Float[Tensor, "D"]:
        """How much smaller than the latents is what quantization leaves of them, at most; 1 where a codebook learns
        the sizes of all that it meets."""
        return 1.0

    def forward(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Quantize; in training mode also learn what is learnt without gradients."""
        return self.choose(self.bound(latents))

    def bound(self, latents: Float[Tensor, "B D *S"]) -> Float[Tensor, "B D *S"]:
        """Bring latents into the range of the code vectors, where these are bounded; with gradients."""
        return latents

    @abstractmethod
    def choose(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Choose the code vector for latents of `bound`; in training mode learn as `forward` does."""

    @abstractmethod
    def code_vectors(self, codes: Int[Tensor, "B *places"]) -> Float[Tensor, "B D *S"]:
        """Return the vectors of codes."""


def along_channels(values: Shaped[Tensor, "D"], like: Shaped[Tensor, "B _ *S"]) -> Shaped[Tensor, "D *_"]:
    """Return one value per channel in a shape that broadcasts against `like`."""
    return values.view(-1, *(1,) * (like.ndim - 2))


def mean_per_item(values: Float[Tensor, "B *S"]) -> Float[Tensor, "B"]:
    """Return the mean of each item over all else."""
    return values.flatten(1).mean(1)
