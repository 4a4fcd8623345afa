"""The any-to-any suite: figures known in advance for models that know everything, and one that knows nothing."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardReader, ShardWriter
from omniform.errors import OmniformError
from omniform.inference.evaluation import CELLS, evaluate_any_to_any
from omniform.inference.generate import Model
from omniform.inference.judges import digit_of_text
from omniform.inference.protocol import ContentPart, ImagePart, Reply, TextPart
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.base import Modality
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer

Answer = Callable[[ContentPart, str], ContentPart]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits, each train image once."""
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, media=False)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """Random weights with tokenizers of the right sizes."""
    torch.manual_seed(0)
    codec = ImageTokenizerConfig(widths=(8, 16))
    tokenizers: dict[str, Modality] = {
        "text": SentencePieceTokenizer.train(["the digit eight\n"] * 9, vocab_size=270),
        "image": ImageTokenizer(codec, codec.build()),
    }
    decoder = DecoderConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16)
    config = ModelConfig(decoder=decoder, objectives={"text": NextToken(), "image": Masked(steps=2)})
    defaults = {"modalities": {"text": {"max_new_tokens": 8}}}
    return LoadedModel(UnifiedModel(config, build_vocabulary(tokenizers)), tokenizers, defaults)


class Answering(Model):
    """A model whose replies are given by a rule instead of sampled."""

    def __init__(self, loaded: LoadedModel, answer: Answer) -> None:
        super().__init__(loaded)
        self.answer = answer

    def generate_batch(  # type: ignore[override]
        self, prompts: Sequence[Any], to: str, *, seed: int = 0, **keywords: Any
    ) -> list[Reply]:
        return [Reply((self.answer(prompt, to),), seed) for prompt in prompts]


def reader_of_everything(loaded: LoadedModel, world: Path) -> Answer:
    """Name every real image's digit, and draw a train image, as the tokenizer shows it, for every digit named."""
    tokenizer: Any = loaded.tokenizers["image"]
    digit_of_pixels: dict[bytes, int] = {}
    drawings: dict[int, Image.Image] = {}
    for split in ("train", "test"):
        for sample in ShardReader(world / split):
            item = tokenizer.read(sample.spans[1].payload)
            digit = sample.metadata["digit"]
            digit_of_pixels[item.numpy().tobytes()] = digit
            if split == "train" and digit not in drawings:
                drawings[digit] = tokenizer.to_pil(tokenizer.decode(tokenizer.encode(item)))

    def answer(prompt: ContentPart, to: str) -> ContentPart:
        if isinstance(prompt, TextPart):
            digit = digit_of_text(prompt.text)
            assert digit is not None
        else:
            digit = digit_of_pixels[prompt.data.numpy().tobytes()]
        return ImagePart(drawings[digit]) if to == "image" else TextPart(f"this is the number {digit}")

    return answer


def test_knowing_everything_scores_one_and_copies_are_found(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Answering(loaded, reader_of_everything(loaded, world)), world)
    cells = metrics["cells"]
    assert list(cells) == list(CELLS)
    assert {name: cells[name]["n"] for name in CELLS} == {"text->image": 252, "image->text": 252, "text->text": 30}
    assert cells["image->text"]["accuracy"] == cells["text->text"]["accuracy"] == 1
    assert cells["text->text"]["ceiling"] == 1
    assert 0.9 < cells["image->text"]["ceiling"] < 1
    assert cells["text->image"]["ceiling"] == cells["image->text"]["ceiling"]
    assert cells["text->image"]["copy_rate"] == 1
    assert cells["image->text"]["copy_rate"] is None


def test_one_answer_for_everything_scores_chance(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Answering(loaded, lambda _prompt, _to: TextPart("two")), world, cells=["image->text"])
    cell = metrics["cells"]["image->text"]
    digits = np.array([sample.metadata["digit"] for sample in ShardReader(world / "test")])
    assert cell["accuracy"] == pytest.approx((digits == 2).mean())
    assert cell["macro_accuracy"] == pytest.approx(cell["chance"]) == pytest.approx(0.1)
    assert cell["per_class"]["2"] == {"accuracy": 1.0, "n": int((digits == 2).sum())}
    assert cell["ci95"][0] < cell["accuracy"] < cell["ci95"][1]


def test_naming_no_digit_is_wrong(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Answering(loaded, lambda _prompt, _to: TextPart("?")), world, cells=["text->text"])
    assert metrics["cells"]["text->text"]["accuracy"] == 0


def test_figures_repeat_and_files_hold_them(loaded: LoadedModel, world: Path, tmp_path: Path) -> None:
    model, out = Model(loaded), tmp_path / "metrics.json"
    metrics = evaluate_any_to_any(model, world, split="validation", cells=CELLS[:2], limit=12, out=out)
    assert json.loads(out.read_text()) == metrics
    assert evaluate_any_to_any(model, world, split="validation", cells=CELLS[:2], limit=12) == metrics
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert {name: len(entries) for name, entries in samples.items()} == {"text->image": 12, "image->text": 12}
    for entry in samples["text->image"]:
        assert digit_of_text(entry["prompt"]["text"]) == entry["digit"]
        png = base64.b64decode(entry["reply"]["image"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(png)).size == (16, 16)
    right = [entry["judged"] == entry["digit"] for entry in samples["text->image"]]
    assert metrics["cells"]["text->image"]["accuracy"] == pytest.approx(sum(right) / 12)


def test_every_held_out_split_can_be_scored(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Model(loaded), world, split="validation", limit=12)
    assert list(metrics["cells"]) == ["text->image", "image->text"]  # there are no text pairs to hold out


def test_a_model_or_data_that_the_suite_cannot_score_is_refused(
    loaded: LoadedModel, world: Path, tmp_path: Path
) -> None:
    text = {"text": loaded.tokenizers["text"]}
    config = ModelConfig(decoder=loaded.model.config.decoder, objectives={"text": NextToken()})
    reader = Model(LoadedModel(UnifiedModel(config, build_vocabulary(text)), text, {}))
    with pytest.raises(OmniformError, match="scores text and images"):
        evaluate_any_to_any(reader, world)
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(RawSample("0", (RawSpan("text", text="seven"),)))
    with pytest.raises(OmniformError, match="sample 0 says no digit to score by"):
        evaluate_any_to_any(Model(loaded), tmp_path)


def test_settings_of_a_target_are_passed_on(loaded: LoadedModel, world: Path) -> None:
    with pytest.raises(OmniformError, match="temperature is -1"):
        evaluate_any_to_any(
            Model(loaded), world, cells=["image->text"], limit=2, sampling={"text": {"temperature": -1}}
        )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cells": ["text->smell"]}, "unknown cells text->smell, expected some of text->image"),
        ({"split": "train"}, "split is 'train', expected a held-out one"),
        ({"data_dir": Path("nowhere"), "out": Path(".")}, r"out is the folder \., expected a file"),
        ({"data_dir": Path("nowhere")}, "nowhere/train holds no .tar shards"),
    ],
)
def test_bad_arguments_are_named(loaded: LoadedModel, world: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        evaluate_any_to_any(Model(loaded), **{"data_dir": world, **keywords})
