"""What every modality tokenizer is: raw data <-> tokens. Knows nothing of the model."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypeVar

from omniform.errors import OmniformError


class TokenizerError(OmniformError):
    """Raw data or codes that a tokenizer cannot take, or a tokenizer folder that cannot be used."""


@dataclass(frozen=True)
class Discrete:
    """Tokens are codes in [0, vocab_size), in each of `n_codebooks` codebooks."""

    vocab_size: int
    n_codebooks: int = 1


@dataclass(frozen=True)
class Continuous:
    """Tokens are real vectors of `channels` numbers."""

    channels: int


@dataclass(frozen=True)
class Tokens:
    """The tokens of one item, row-major over `grid`.

    Attributes:
        codes: codes of the modality itself, starting at 0: the Vocabulary alone turns them into ids of the model.
        grid: length per axis; its product is the number of codes. 1-d text and speech (T,), 2-d image (H, W),
            3-d video (T, H, W).
    """

    codes: Int[Tensor, "N"]
    grid: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class Latents:
    """The continuous tokens of one item, row-major over `grid`, which is as in `Tokens`."""

    values: Float[Tensor, "N C"]
    grid: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)


TokensT = TypeVar("TokensT", bound=Tokens | Latents, default=Tokens)


class Modality(ABC, Generic[TokensT]):
    """A kind of data and its tokenizer, whose tokens are `Tokens` if its representation is discrete, else `Latents`.

    A subclass is one file; one line in `registry.py` makes it known. `kind` names the class in stored folders,
    `name` the modality that it serves ("text", "image", ...).
    """

    kind: ClassVar[str]
    name: ClassVar[str]
    representation: Discrete | Continuous

    @property
    @abstractmethod
    def fixed_grid(self) -> tuple[int, ...] | None:
        """The grid of every generated span, or None where the span ends itself with the end token."""

    @abstractmethod
    def encode_batch(self, items: Sequence[Any]) -> list[TokensT]:
        """Turn raw items into tokens; the result of an item may depend on the batch's size only by rounding."""

    @abstractmethod
    def decode_batch(self, tokens: Sequence[TokensT]) -> list[Any]:
        """Turn tokens back into raw items."""

    @abstractmethod
    def read(self, payload: bytes) -> Any:
        """Decode the bytes of a shard's payload member or of a user's file into the raw form that encode takes.

        Raises:
            TokenizerError: the bytes are not such a file, or are larger than the tokenizer's stated bound.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder` with `folder.write_tokenizer_folder`. Never pickle."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            TokenizerError: a file is missing or damaged.
        """

    def encode(self, item: Any) -> TokensT:
        """Turn one raw item into tokens."""
        return self.encode_batch([item])[0]

    def n_tokens(self, item: Any) -> int | None:
        """Return how many tokens an item has, where that is known without encoding it; else None."""
        return None

    def decode(self, tokens: TokensT) -> Any:
        """Turn the tokens of one item back into its raw form."""
        return self.decode_batch([tokens])[0]


def folder_digest(folder: Path) -> str:
    """Return the sha256 over names and contents of a tokenizer folder's files, in name order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
