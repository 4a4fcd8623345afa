"""What the tokenizers of images, speech and video share: a codec that a config builds, stored as its weights."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import safetensors
import torch
from jaxtyping import Shaped
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from omniform.tokenizers.base import Continuous, Discrete, Modality, TokenizerError, TokensT
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder

if TYPE_CHECKING:
    from omniform.tokenizers.codecs.codec import Codec

_PAYLOAD = "codec.safetensors"


class CodecTokenizer(Modality[TokensT]):
    """A tokenizer that is a codec.

    Args:
        config: of `config_type`.
        codec: what `config.build()` gives; it is put in evaluation mode.
    """

    config_type: ClassVar[type[Any]]

    def __init__(self, config: Any, codec: "Codec") -> None:
        self.config = config
        self.codec = codec.eval().requires_grad_(False)
        self.representation: Discrete | Continuous = codec.quantizer.representation

    @abstractmethod
    def grid(self, item: Any) -> tuple[int, ...]:
        """Return the grid of an item's tokens."""

    def n_tokens(self, item: Any) -> int | None:
        """Return how many tokens an item has, without encoding it; None where it has no such shape as items have."""
        try:
            return math.prod(self.grid(item))
        except (AttributeError, IndexError):
            return None

    @abstractmethod
    def compact(self, item: Any) -> Shaped[Tensor, "*S"]:
        """Return an item as integers, which a trainer holds in memory; as fine as the files it is read from."""

    @abstractmethod
    def expand(self, compact: Shaped[Tensor, "*S"]) -> Any:
        """Turn what `compact` returned, or a stack of it, back into items."""

    @abstractmethod
    def write_comparison(self, items: Sequence[Any], stem: Path) -> list[Path]:
        """Write items and what their tokens decode to, for people to compare, into files whose names begin with `stem`;
        return the files."""

    def save(self, folder: Path) -> None:
        """Write the codec's weights and config.json."""
        plain = TypeAdapter(self.config_type).dump_python(self.config, mode="json")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.codec.state_dict().items()}
        write_tokenizer_folder(folder, self.kind, plain, (_PAYLOAD, save(weights)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        plain, payload = read_tokenizer_folder(folder, cls.kind)
        try:
            config = TypeAdapter(cls.config_type).validate_python(plain)
            codec = config.build()
            codec.load_state_dict(load(payload))
        except (ValidationError, safetensors.SafetensorError, RuntimeError) as error:
            raise TokenizerError(
                f"{folder}: config and weights do not make a tokenizer of {cls.name}: {error}"
            ) from error
        return cls(config, codec)

    def check_codes(self, codes: Shaped[Tensor, "*N"]) -> None:
        """Check that codes are of the codebook.

        Raises:
            TokenizerError: they are not.
        """
        size = self.codec.quantizer.codebook_size
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < size):
            raise TokenizerError(f"codes span [{codes.min()}, {codes.max()}], expected [0, {size - 1}]")


def to_bytes(values: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
    """Return pixels in [-1, 1] as the nearest of 256 levels, uint8; values beyond are clamped."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_bytes(levels: Shaped[Tensor, "*S"]) -> Shaped[Tensor, "*S"]:
    """Return what `to_bytes` made as float32 pixels in [-1, 1]."""
    return levels.float() / 127.5 - 1
