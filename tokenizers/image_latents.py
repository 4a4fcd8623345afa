"""Images <-> a grid of real vectors: of a variational autoencoder, or the pixels themselves, patch by patch."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from omniform.tokenizers.base import Continuous, Latents, TokenizerError
from omniform.tokenizers.codec_tokenizer import CodecTokenizer
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder
from omniform.tokenizers.image import ConvImageConfig
from omniform.tokenizers.images import ImageConfig, ImageModality

if TYPE_CHECKING:
    from omniform.tokenizers.codecs.codec import Codec

_CHUNK = 256  # images in one pass of the codec, which bounds memory


class ContinuousImages(ImageModality[Latents]):
    """A tokenizer of images whose tokens are real vectors on a square grid, row-major."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Tokens per side of an image."""

    @property
    def fixed_grid(self) -> tuple[int, int]:
        """Tokens per column and row."""
        return self.side, self.side

    def grid(self, item: Float[Tensor, "C H W"]) -> tuple[int, int]:
        """Return `fixed_grid`."""
        return self.fixed_grid

    @torch.no_grad()
    def encode_batch(self, items: Sequence[Any]) -> list[Latents]:
        """Turn images into vectors.

        Raises:
            TokenizerError: an item has another shape or type, or values outside [-1, 1].
        """
        for item in items:
            self.check_item(item)
        vectors = [self._encode(torch.stack(list(items[i : i + _CHUNK]))) for i in range(0, len(items), _CHUNK)]
        return [
            Latents(rearrange(grid, "c h w -> (h w) c").contiguous(), self.fixed_grid)
            for part in vectors
            for grid in part
        ]

    @torch.no_grad()
    def decode_batch(self, tokens: Sequence[Latents]) -> list[Float[Tensor, "C H W"]]:
        """Turn vectors into images, clamped to [-1, 1].

        Raises:
            TokenizerError: another grid, another number of channels, or values that are not finite.
        """
        assert isinstance(self.representation, Continuous)
        expected = (math.prod(self.fixed_grid), self.representation.channels)
        for entry in tokens:
            if tuple(entry.grid) != self.fixed_grid or tuple(entry.values.shape) != expected:
                raise TokenizerError(
                    f"values of shape {tuple(entry.values.shape)} and grid {entry.grid}, expected {expected} and the "
                    f"grid {self.fixed_grid}"
                )
            if not entry.values.isfinite().all():
                raise TokenizerError("some values of an image are not finite numbers: expected finite ones")
        grids = [rearrange(entry.values, "(h w) c -> c h w", h=self.side) for entry in tokens]
        images = [self._decode(torch.stack(grids[i : i + _CHUNK])) for i in range(0, len(grids), _CHUNK)]
        return [image.clamp(-1, 1) for part in images for image in part]

    @abstractmethod
    def _encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]: ...

    @abstractmethod
    def _decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]: ...


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImageLatentsConfig(ConvImageConfig):
    """Sizes of a variational autoencoder of images.

    Attributes:
        latent_channels: real numbers per token.
    """

    latent_channels: int = Field(default=4, ge=1)

    def build(self) -> "Codec":
        """Return the codec with random weights from torch's generator."""
        from omniform.tokenizers.codecs.conv import ConvCodec
        from omniform.tokenizers.codecs.gaussian import GaussianBottleneck

        bottleneck = GaussianBottleneck(self.latent_channels)
        return ConvCodec(self.channels, self.patch_size, self.widths, self.n_blocks, bottleneck)


class ImageLatentsTokenizer(ContinuousImages, CodecTokenizer[Latents]):
    """A grid of latents of a KL-regularised autoencoder, each channel of mean 0 and variance 1 over the training data.

    Source: arXiv:1312.6114; as the first stage of image generation arXiv:2112.10752, section 3.1.
    """

    kind = "conv_kl"
    config_type = ImageLatentsConfig
    config: ImageLatentsConfig

    @property
    def side(self) -> int:
        """Latents per side of an image."""
        return self.config.side

    def _encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        return self.codec.encode(images)

    def _decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        return self.codec.decode(latents)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ImagePatchesConfig(ImageConfig):
    """Sizes of raw patches.

    Attributes:
        patch_size: pixels per side of the area that one token stands for.
    """

    patch_size: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _check_grid(self) -> "ImagePatchesConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}, expected a multiple of patch_size = {self.patch_size}")
        return self


class ImagePatchesTokenizer(ContinuousImages):
    """Pixels as they are: a token is a patch, its values in [-1, 1], channels first, then row by row. Nothing is learnt
    and nothing is lost.

    Source: ViT (Dosovitskiy et al. 2020), arXiv:2010.11929, section 3.1, without its linear projection, which belongs
    to the model.
    """

    kind = "patches"
    config: ImagePatchesConfig

    def __init__(self, config: ImagePatchesConfig) -> None:
        self.config = config
        self.representation = Continuous(config.channels * config.patch_size**2)

    @property
    def side(self) -> int:
        """Patches per side of an image."""
        return self.config.image_size // self.config.patch_size

    def save(self, folder: Path) -> None:
        """Write config.json and an empty payload: there are no weights."""
        plain = TypeAdapter(ImagePatchesConfig).dump_python(self.config, mode="json")
        write_tokenizer_folder(folder, self.kind, plain, ("no-weights", b""))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        plain, _ = read_tokenizer_folder(folder, cls.kind)
        try:
            return cls(TypeAdapter(ImagePatchesConfig).validate_python(plain))
        except ValidationError as error:
            raise TokenizerError(f"{folder}: its config does not describe patches: {error}") from error

    def _encode(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        size = self.config.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (c p q) h w", p=size, q=size)

    def _decode(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        size = self.config.patch_size
        return rearrange(latents, "b (c p q) h w -> b c (h p) (w q)", p=size, q=size)
