"""Images <-> a grid of codes of a convolutional autoencoder."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import safetensors
import torch
from jaxtyping import Float
from PIL import Image
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import load, save
from torch import Tensor

from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.quantizers import QuantizerConfig
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder
from omniform.tokenizers.image_files import (
    Fit,
    Mode,
    fit_picture,
    fitted_frame,
    plain_picture,
    read_picture,
)

if TYPE_CHECKING:
    from omniform.tokenizers.codecs.codec import Codec

_PAYLOAD = "codec.safetensors"
_CHUNK = 256  # images in one pass of the codec, which bounds memory


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImageTokenizerConfig:
    """Sizes of an image tokenizer.

    Attributes:
        channels: 1 for grey, 3 for colour.
        image_size: pixels per side.
        fit: how a picture of another shape is brought to that size: its central square ("crop"), all of it with margins
            ("pad"), or all of it with other proportions ("stretch").
        background: grey level of the margins that "pad" leaves.
        patch_size: pixels per side of the patches that the first layer reads.
        widths: channels at each resolution, each half as fine as the one before.
        n_blocks: residual blocks at each resolution, in encoder and decoder each.
        margin: pixels around its own area that a code sees; null: all of the image, for norms run over the whole.
    """

    channels: Literal[1, 3] = 1
    image_size: int = Field(default=16, ge=1)
    fit: Fit = "crop"
    background: int = Field(default=255, ge=0, le=255)
    patch_size: int = Field(default=2, ge=1)
    widths: Annotated[tuple[Annotated[int, Field(ge=8, multiple_of=8)], ...], Field(min_length=1)] = (64, 96)
    n_blocks: int = Field(default=1, ge=1)
    margin: int | None = Field(default=None, ge=0)
    quantizer: QuantizerConfig = FSQConfig()

    @property
    def downsampling(self) -> int:
        """Pixels per side of the area that one code stands for."""
        return int(self.patch_size * 2 ** (len(self.widths) - 1))

    @model_validator(mode="after")
    def _check_grid(self) -> "ImageTokenizerConfig":
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {self.downsampling} = patch_size x 2 for "
                "each width after the first"
            )
        return self

    def build(self) -> "Codec":
        """Return the codec with random weights from torch's generator."""
        quantizer = self.quantizer.build()
        if self.margin is None:
            from omniform.tokenizers.codecs.conv import ConvCodec

            return ConvCodec(self.channels, self.patch_size, self.widths, self.n_blocks, quantizer)
        from omniform.tokenizers.codecs.local import LocalCodec

        return LocalCodec(self.channels, self.downsampling, self.margin, self.widths, self.n_blocks, quantizer)


class ImageTokenizer(Modality):
    """A grid of codes per image. An item is a float32 tensor (C, H, W) in [-1, 1] of the config's size.

    Args:
        codec: of this config; it is put in evaluation mode.
    """

    kind = "conv_vq"
    name = "image"

    def __init__(self, config: ImageTokenizerConfig, codec: "Codec") -> None:
        self.config = config
        self.codec = codec.eval().requires_grad_(False)
        self.representation = Discrete(codec.quantizer.codebook_size)

    @property
    def fixed_grid(self) -> tuple[int, ...]:
        """Codes per column and row; where each place has several codes, as many such grids, coarse first."""
        side, depth = self.config.image_size // self.config.downsampling, self.codec.quantizer.depth
        return (side, side) if depth == 1 else (depth, side, side)

    @torch.no_grad()
    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn images into codes.

        Raises:
            TokenizerError: an item has another shape or type, or values outside [-1, 1].
        """
        for item in items:
            self._check_item(item)
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
            self._check_tokens(entry)
        grids = [entry.codes.view(self.fixed_grid) for entry in tokens]
        if len(self.fixed_grid) == 3:
            grids = [grid.movedim(0, -1) for grid in grids]
        images = [self.codec.decode(torch.stack(grids[i : i + _CHUNK])) for i in range(0, len(grids), _CHUNK)]
        return [image for chunk in images for image in chunk]

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
        return pixels.permute(2, 0, 1).float() / 127.5 - 1

    def to_pil(self, item: Float[Tensor, "C H W"]) -> Image.Image:
        """Turn an item into an 8-bit image; `from_pil` gives it back to within half a grey level."""
        levels = ((item.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
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

    def save(self, folder: Path) -> None:
        """Write the codec's weights and config.json."""
        plain = TypeAdapter(ImageTokenizerConfig).dump_python(self.config, mode="json")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.codec.state_dict().items()}
        write_tokenizer_folder(folder, self.kind, plain, (_PAYLOAD, save(weights)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        plain, payload = read_tokenizer_folder(folder, cls.kind)
        try:
            config = TypeAdapter(ImageTokenizerConfig).validate_python(plain)
            codec = config.build()
            codec.load_state_dict(load(payload))
        except (ValidationError, safetensors.SafetensorError, RuntimeError) as error:
            raise TokenizerError(f"{folder}: config and weights do not make an image tokenizer: {error}") from error
        return cls(config, codec)

    def _check_item(self, item: object) -> None:
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if not isinstance(item, Tensor) or item.dtype != torch.float32 or tuple(item.shape) != expected:
            given = f"{item.dtype} {tuple(item.shape)}" if isinstance(item, Tensor) else type(item).__name__
            raise TokenizerError(
                f"an image is {given}, expected float32 {expected}: `read` and `from_pil` make such tensors"
            )
        if not (item.abs() <= 1).all():
            raise TokenizerError(f"an image spans [{item.min()}, {item.max()}], expected finite values in [-1, 1]")

    def _check_tokens(self, tokens: Tokens) -> None:
        codes, size = tokens.codes, self.codec.quantizer.codebook_size
        if tuple(tokens.grid) != self.fixed_grid or len(codes) != math.prod(self.fixed_grid):
            raise TokenizerError(f"{len(codes)} codes of grid {tokens.grid}, expected the grid {self.fixed_grid}")
        if not (int(codes.min()) >= 0 and int(codes.max()) < size):
            raise TokenizerError(f"codes span [{codes.min()}, {codes.max()}], expected [0, {size - 1}]")
