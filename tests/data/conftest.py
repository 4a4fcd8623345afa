"""Two tokenizers simple enough to check by eye, shards for them, and small tokenizers of every modality."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.codecs.residual import ResidualConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.image_latents import ImagePatchesConfig, ImagePatchesTokenizer
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omniform.tokenizers.vocabulary import Vocabulary


class ByteText(Modality):
    """Text as its UTF-8 bytes."""

    kind, name = "byte_text", "text"
    representation = Discrete(256)
    fixed_grid = None

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """One code per byte."""
        return [Tokens(torch.tensor(list(item.encode()), dtype=torch.int64), (len(item.encode()),)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        """Back to text."""
        return [bytes(entry.codes.tolist()).decode() for entry in tokens]

    def read(self, payload: bytes) -> str:
        """UTF-8."""
        return payload.decode()

    def save(self, folder: Path) -> None:
        """Nothing but the kind."""
        (folder / "config.json").write_text(self.kind)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """It has no settings."""
        return cls()


class Nibbles(Modality):
    """A payload of two bytes as a 2 x 2 grid of 4-bit codes, rotated by `turn`; other payloads are damaged."""

    kind, name = "nibbles", "image"
    representation = Discrete(16)
    fixed_grid = (2, 2)

    def __init__(self, turn: int = 0) -> None:
        self.turn = turn
        self.n_encoded = 0

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Four codes; items above 0xff00 are refused here rather than in `read`."""
        if any(item >= 0xFF00 for item in items):
            raise TokenizerError("above ff00")
        self.n_encoded += len(items)
        codes = [[(item >> shift) + self.turn & 15 for shift in (12, 8, 4, 0)] for item in items]
        return [Tokens(torch.tensor(entry), (2, 2)) for entry in codes]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[int]:
        """Back to a number."""
        return [int("".join(f"{int(code) - self.turn & 15:x}" for code in entry.codes), 16) for entry in tokens]

    def read(self, payload: bytes) -> int:
        """Two bytes."""
        if len(payload) != 2:
            raise TokenizerError(f"{len(payload)} bytes, expected 2")
        return int.from_bytes(payload)

    def save(self, folder: Path) -> None:
        """The kind and the setting."""
        (folder / "config.json").write_text(f"{self.kind} {self.turn}")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the setting."""
        return cls(int((folder / "config.json").read_text().split()[1]))


@pytest.fixture
def tokenizers() -> dict[str, Modality]:
    """One for text and one for images."""
    return {"text": ByteText(), "image": Nibbles()}


@pytest.fixture
def turned_tokenizers() -> dict[str, Modality]:
    """The same but for a setting."""
    return {"text": ByteText(), "image": Nibbles(turn=1)}


@pytest.fixture
def byte_vocabulary() -> Vocabulary:
    """Ids of the two."""
    return Vocabulary(256, {"image": Discrete(16)})


@pytest.fixture
def objectives() -> dict[str, Any]:
    """One of each kind."""
    return {"text": NextToken(), "image": Masked()}


@pytest.fixture
def write_pairs() -> Callable[..., Path]:
    """Write samples of the text "t<n>" with n % 5 letters more and the image n; payload by n where one is given."""

    def write(folder: Path, n_samples: int, payloads: dict[int, bytes] | None = None, per_shard: int = 40) -> Path:
        with ShardWriter(folder, per_shard) as writer:
            for n in range(n_samples):
                payload = (payloads or {}).get(n, n.to_bytes(2))
                text = RawSpan("text", text=f"t{n}" + "x" * (n % 5))
                writer.write(
                    RawSample(f"{n:05d}", (text, RawSpan("image", payload=payload, extension="bin")), {"n": n})
                )
        return folder

    return write


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of digits-world, with three copies of each training image, and two of everything else."""
    return build_digits(tmp_path_factory.mktemp("world") / "digits", seed=3, copies=3, limit=2)


def small(seed: int) -> dict[str, Modality]:
    """Small tokenizers of every modality with random weights."""
    torch.manual_seed(seed)
    image = ImageTokenizerConfig(patch_size=4, widths=(8,), quantizer=FSQConfig(levels=(4, 3)))
    speech = SpeechTokenizerConfig(width=8, n_blocks=1, quantizer=FSQConfig(levels=(3, 3)))
    quantizer = ResidualConfig(depth=2, base=FSQConfig(levels=(3, 5)))
    video = VideoTokenizerConfig(patch_size=16, widths=(8,), time_strides=(), quantizer=quantizer)
    return {
        "text": SentencePieceTokenizer.train(["one digit"], vocab_size=265),
        "image": ImageTokenizer(image, image.build()),
        "speech": SpeechTokenizer(speech, speech.build()),
        "video": VideoTokenizer(video, video.build()),
    }


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers as a worker process loads them, and another one for images."""
    folder = tmp_path_factory.mktemp("tokenizers")
    patches = ImagePatchesTokenizer(ImagePatchesConfig(channels=1, image_size=16, patch_size=8))
    for name, tokenizer in {**small(0), "other image": small(1)["image"], "patches": patches}.items():
        (folder / name).mkdir()
        tokenizer.save(folder / name)
    return {path.name: path for path in sorted(folder.iterdir())}
