"""What every tokenizer of images shares: files and pictures <-> float tensors of one size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.base import Modality, TokenizerError, TokensT
from omniform.tokenizers.codec_tokenizer import from_bytes, to_bytes
from omniform.tokenizers.image_files import Fit, Mode, fit_picture, fitted_frame, plain_picture, read_picture


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImageConfig:
    """What an item of an image tokenizer is.

    Attributes:
        channels: 1 for grey, 3 for colour.
        image_size: pixels per side.
        fit: how a picture of another shape is brought to that size: its central square ("crop"), all of it with margins
            ("pad"), or all of it with other proportions ("stretch").
        background: grey level of the margins that "pad" leaves.
    """

    channels: Literal[1, 3] = 1
    image_size: int = Field(default=16, ge=1)
    fit: Fit = "crop"
    background: int = Field(default=255, ge=0, le=255)


class ImageModality(Modality[TokensT]):
    """A tokenizer of images. An item is a float32 tensor (C, H, W) in [-1, 1] of the config's size."""

    name = "image"
    config: ImageConfig

    def read(self, payload: bytes) -> Float[Tensor, "C H W"]:
        """Decode an image file (`image_files` says which) and fit it to the tokenizer.

        Raises:
            TokenizerError: it is not a whole image, or above the bounds of `image_files`.
        """
        return self._fitted(read_picture(payload, self._mode))

    def from_pil(self, image: Image.Image) -> Float[Tensor, "C H W"]:
        """Turn any image upright, lay it on white where it is transparent, and bring it to the tokenizer's size, in the
        way that the config's `fit` says, and channels.

        Raises:
            TokenizerError: it cannot be decoded, or is above the bounds of `image_files`.
        """
        return self._fitted(plain_picture(image, self._mode))

    def frame(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom), in pixels of a picture of `size`, of what an item shows of it."""
        return fitted_frame(size, (self.config.image_size, self.config.image_size), self.config.fit)

    @property
    def _mode(self) -> Mode:
        return "L" if self.config.channels == 1 else "RGB"

    def _fitted(self, picture: Image.Image) -> Float[Tensor, "C H W"]:
        size = (self.config.image_size, self.config.image_size)
        fitted = fit_picture(picture, size, self.config.fit, self.config.background)
        pixels = torch.from_numpy(np.array(fitted)).view(*size, self.config.channels)
        return from_bytes(pixels.permute(2, 0, 1))

    def to_pil(self, item: Float[Tensor, "C H W"]) -> Image.Image:
        """Turn an item into an 8-bit image; `from_pil` gives it back to within half a grey level."""
        levels = to_bytes(item)
        return Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())

    def comparison(self, items: Sequence[Float[Tensor, "C H W"]], *, scale: int = 4, columns: int = 8) -> Image.Image:
        """Return one picture on white: rows of `columns` items, and below each what its codes decode to, `scale` times
        enlarged, with two pixels of that size between pairs."""
        size, gap = self.config.image_size * scale, 2 * scale
        width, height = size + gap, 2 * size + gap
        grid = (min(columns, len(items)) * width - gap, -(-len(items) // columns) * height - gap)
        sheet = Image.new("L" if self.config.channels == 1 else "RGB", grid, "white")
        for below, images in enumerate((items, self.decode_batch(self.encode_batch(items)))):
            for place, image in enumerate(images):
                row, column = divmod(place, columns)
                enlarged = self.to_pil(image).resize((size, size), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (column * width, row * height + below * size))
        return sheet

    def write_comparison(self, items: Sequence[Float[Tensor, "C H W"]], stem: Path) -> list[Path]:
        """Write `comparison` of the items as one PNG."""
        path = stem.with_name(f"{stem.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.comparison(items).save(path)
        return [path]

    def compact(self, item: Float[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
        """Return the item's 256 levels."""
        return to_bytes(item)

    def expand(self, compact: UInt8[Tensor, "*N C H W"]) -> Float[Tensor, "*N C H W"]:
        """Turn levels back into an item."""
        return from_bytes(compact)

    def check_item(self, item: object) -> None:
        """Check that a thing is an item.

        Raises:
            TokenizerError: it has another shape or type, or values outside [-1, 1].
        """
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if not isinstance(item, Tensor) or item.dtype != torch.float32 or tuple(item.shape) != expected:
            given = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            raise TokenizerError(
                f"an image is {given}, expected float32 {expected}: `read` and `from_pil` make such tensors"
            )
        if not (item.abs() <= 1).all():
            raise TokenizerError(f"an image spans [{item.min()}, {item.max()}], expected finite values in [-1, 1]")
