"""Images <-> a grid of codes of a convolutional autoencoder."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.base import TokenizerError, Tokens
from omniform.tokenizers.codec_tokenizer import CodecTokenizer
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.quantizers import QuantizerConfig
from omniform.tokenizers.images import ImageConfig, ImageModality

if TYPE_CHECKING:
    from omniform.tokenizers.codecs.codec import Codec

_CHUNK = 256  # images in one pass of the codec, which bounds memory


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ConvImageConfig(ImageConfig):
    """Sizes of a convolutional codec of images.

    Attributes:
        patch_size: pixels per side of the patches that the first layer reads.
        widths: channels at each resolution, each half as fine as the one before.
        n_blocks: residual blocks at each resolution, in encoder and decoder each.
    """

    patch_size: int = Field(default=2, ge=1)
    widths: Annotated[tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...], Field(min_length=1)] = (64, 96)
    n_blocks: int = Field(default=1, ge=1)

    @property
    def downsampling(self) -> int:
        """Pixels per side of the area that one token stands for."""
        return int(self.patch_size * 2 ** (len(self.widths) - 1))

    @property
    def side(self) -> int:
        """Tokens per side of an image."""
        return self.image_size // self.downsampling

    @model_validator(mode="after")
    def _check_grid(self) -> "ConvImageConfig":
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.downsampling} = patch_size x 2 for "
                "each width after the first"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImageTokenizerConfig(ConvImageConfig):
    """Sizes of an image tokenizer.

    Attributes:
        margin: pixels around its own area that a code sees; null: all of the image, for norms run over the whole.
    """

    margin: int | None = Field(default=None, ge=0)
    quantizer: QuantizerConfig = FSQConfig()

    def build(self) -> "Codec":
        """Return the codec with random weights from torch's generator."""
        quantizer = self.quantizer.build()
        if self.margin is None:
            from omniform.tokenizers.codecs.conv import ConvCodec

            return ConvCodec(self.channels, self.patch_size, self.widths, self.n_blocks, quantizer)
        from omniform.tokenizers.codecs.local import LocalCodec

        return LocalCodec(self.channels, self.downsampling, self.margin, self.widths, self.n_blocks, quantizer)


class ImageTokenizer(ImageModality[Tokens], CodecTokenizer[Tokens]):
    """A grid of codes per image. An item is a float32 tensor (C, H, W) in [-1, 1] of the config's size."""

    kind = "conv_vq"
    config_type = ImageTokenizerConfig
    config: ImageTokenizerConfig

    @property
    def fixed_grid(self) -> tuple[int, ...]:
        """Codes per column and row; where each place has several codes, as many such grids, coarse first."""
        side, depth = self.config.side, self.codec.quantizer.depth
        return (side, side) if depth == 1 else (depth, side, side)

    def grid(self, item: Float[Tensor, "C H W"]) -> tuple[int, ...]:
        """Return `fixed_grid`."""
        return self.fixed_grid

    @torch.no_grad()
    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn images into codes.

        Raises:
            TokenizerError: an item has another shape or type, or values outside [-1, 1].
        """
        for item in items:
            self.check_item(item)
        codes = [self.codec.encode(torch.stack(list(items[i : i + _CHUNK]))) for i in range(0, len(items), _CHUNK)]
        grids = [grid if grid.ndim == 2 else grid.movedim(-1, 0) for chunk in codes for grid in chunk]
        return [Tokens(grid.flatten(), self.fixed_grid) for grid in grids]

    @torch.no_grad()
    def decode_batch(self, tokens: Sequence[Tokens]) -> list[Float[Tensor, "C H W"]]:
        """Turn codes into images.

        Raises:
            TokenizerError: another grid, or a code outside the codebook.
        """
        for entry in tokens:
            if tuple(entry.grid) != self.fixed_grid or len(entry.codes) != math.prod(self.fixed_grid):
                raise TokenizerError(
                    f"{len(entry.codes)} codes of grid {entry.grid}, expected the grid {self.fixed_grid}"
                )
            self.check_codes(entry.codes)
        grids = [entry.codes.view(self.fixed_grid) for entry in tokens]
        if len(self.fixed_grid) == 3:
            grids = [grid.movedim(0, -1) for grid in grids]
        images = [self.codec.decode(torch.stack(grids[i : i + _CHUNK])) for i in range(0, len(grids), _CHUNK)]
        return [image for chunk in images for image in chunk]
