"""Finite scalar quantization: round each channel; the codebook is the grid of what it can be rounded to."""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.codecs.quantizer import Quantized, Quantizer, along_channels


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FSQConfig:
    """Finite scalar quantization: codebook size is the product of `levels`, the number of values per channel."""

    kind: Literal["fsq"] = "fsq"
    levels: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(min_length=1)] = (8, 8)

    def build(self) -> "FSQ":
        """Return the quantizer."""
        return FSQ(self.levels)


class FSQ(Quantizer):
    """Round each channel to one of a few values; the codebook is their product and nothing is learnt.

    Source: Finite Scalar Quantization (Mentzer et al. 2023), arXiv:2309.15505, section 3 and appendix A.1. Deviation:
    the shift of channels with an even number of levels is atanh(offset / reach), so that input 0 maps to 0 exactly;
    the paper's listing has tan there. A channel has at least 3 levels, for which atanh is defined.
    """

    levels: Int[Tensor, "D"]
    place_values: Int[Tensor, "D"]

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        counts = torch.tensor(levels)
        self.register_buffer("levels", counts, persistent=False)
        self.register_buffer("place_values", torch.cumprod(counts, 0) // counts, persistent=False)

    @property
    def residual_scale(self) -> Float[Tensor, "D"]:
        """One over the levels of each channel: the finer grid fills the interval that rounds to one value, evenly
        where the levels are odd and short of its upper end where they are even."""
        return 1 / self.levels

    def bound(self, latents: Float[Tensor, "B D *S"]) -> Float[Tensor, "B D *S"]:
        """Squash each channel into the interval that rounds to its values."""
        with torch.autocast(latents.device.type, enabled=False):
            levels = along_channels(self.levels, latents)
            reach = (levels - 1) * (1 - 1e-3) / 2
            offset = 0.5 * (levels % 2 == 0)
            bounded = torch.tanh(latents.float() + torch.atanh(offset / reach)) * reach - offset
            return bounded / (levels // 2)

    def choose(self, latents: Float[Tensor, "B D *S"]) -> Quantized:
        """Round to the nearest values and number them."""
        levels = along_channels(self.levels, latents)
        half = levels // 2
        digits = (latents * half).round().long() + half
        digits = torch.minimum(digits.clamp(min=0), levels - 1)
        codes = (digits * along_channels(self.place_values, latents)).sum(1)
        return Quantized(latents + ((digits - half) / half - latents).detach(), codes, {})

    def code_vectors(self, codes: Int[Tensor, "B *S"]) -> Float[Tensor, "B D *S"]:
        """Read a code as a number of mixed radix: one digit per channel, scaled to [-1, 1]."""
        numbers = codes[:, None]
        levels, place_values = along_channels(self.levels, numbers), along_channels(self.place_values, numbers)
        half = levels // 2
        digits = numbers // place_values % levels  # (B, D, *S)
        return (digits - half).float() / half
