"""A tiny model of random weights with tokenizers whose every code can be read by eye."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from omniform.inference.generate import Model
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens


class ByteText(Modality):
    """Text whose codes are its UTF-8 bytes."""

    kind: ClassVar[str] = "bytes"
    name: ClassVar[str] = "text"
    representation = Discrete(256)
    fixed_grid = None

    def encode_batch(self, items: Sequence[str]) -> list[Tokens]:
        found = [torch.tensor(list(item.encode()), dtype=torch.int64) for item in items]
        return [Tokens(codes, (len(codes),)) for codes in found]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        return [bytes(t.codes.tolist()).decode(errors="replace") for t in tokens]

    def read(self, payload: bytes) -> str:
        return payload.decode()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()


class GrayLevels(Modality):
    """Pictures of 2 x 2 pixels in 8 levels of gray."""

    kind: ClassVar[str] = "gray"
    name: ClassVar[str] = "image"
    representation = Discrete(8)
    fixed_grid = (2, 2)

    def from_pil(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image.convert("L").resize((2, 2)), dtype=np.float32) / 127.5 - 1)[None]

    def frame(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        return (0.0, 0.0, float(size[0]), float(size[1]))

    def to_pil(self, item: Tensor) -> Image.Image:
        return Image.fromarray(((item[0] + 1) * 127.5).round().byte().numpy())

    def encode_batch(self, items: Sequence[Tensor]) -> list[Tokens]:
        return [Tokens(((item.flatten() + 1) * 3.5).round().long(), (2, 2)) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        return [t.codes.reshape(1, 2, 2) / 3.5 - 1 for t in tokens]

    def read(self, payload: bytes) -> Any:
        try:
            return self.from_pil(Image.open(io.BytesIO(payload), formats=["PNG"]))
        except OSError as error:
            raise TokenizerError(f"{len(payload)} bytes are not a PNG image") from error

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls()


@pytest.fixture
def omni() -> Model:
    """Text and pictures; at most 60 rows."""
    tokenizers = {"text": ByteText(), "image": GrayLevels()}
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=32)
    objectives = {"text": NextToken(), "image": Masked(steps=3)}
    config = ModelConfig(decoder=decoder, objectives=objectives, next_span_weight=0.1)
    torch.manual_seed(0)
    network = UnifiedModel(config, build_vocabulary(tokenizers))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    generation_config = {
        "max_sequence_length": 60,
        "modalities": {"text": {"max_new_tokens": 12}, "image": {"guidance_scale": 2.0}},
    }
    return Model(LoadedModel(network, tokenizers, generation_config))
