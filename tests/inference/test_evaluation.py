"""The any-to-any suite on real items: what it must say of replies whose figures are known in advance."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.cell_report import cells_as_text
from omniform.data.digits import build_digits
from omniform.data.schema import RawSample, RawSpan
from omniform.data.shards import ShardReader, ShardWriter
from omniform.errors import OmniformError
from omniform.inference.evaluation import evaluate_any_to_any
from omniform.inference.evaluation_copies import repeats
from omniform.inference.evaluation_items import CELLS, World
from omniform.inference.evaluation_judging import Judges
from omniform.inference.generate import Model
from omniform.inference.judges import MOTIONS, digit_of_text
from omniform.inference.protocol import ContentPart, DataPart, Reply, TextPart
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.subsets import AnySubset
from omniform.sample_report import samples_section
from omniform.tokenizers.audio_files import read_audio
from omniform.tokenizers.base import Modality
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.speech import SpeechTokenizer, SpeechTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.tokenizers.video import VideoTokenizer, VideoTokenizerConfig
from omniform.tokenizers.video_files import read_video

Answer = Callable[[ContentPart, str], ContentPart]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits in four modalities, each train image once and few of everything else."""
    return build_digits(tmp_path_factory.mktemp("world") / "digits", copies=1, limit=1)


def loaded_model(names: Sequence[str], sample_rate: int = 16_000) -> LoadedModel:
    """Random weights, and tokenizers of the right sizes with random weights."""
    torch.manual_seed(0)
    image = ImageTokenizerConfig(widths=(8, 16))
    speech = SpeechTokenizerConfig(
        sample_rate=sample_rate, width=8, n_blocks=1, frame_samples=1280, quantizer=FSQConfig(levels=(7, 7))
    )
    video = VideoTokenizerConfig(patch_size=8, widths=(8,), time_strides=(), quantizer=FSQConfig(levels=(9, 9)))
    every: dict[str, Modality] = {
        "text": SentencePieceTokenizer.train(["the digit eight\n"] * 9, vocab_size=270),
        "image": ImageTokenizer(image, image.build()),
        "speech": SpeechTokenizer(speech, speech.build()),
        "video": VideoTokenizer(video, video.build()),
    }
    tokenizers = {name: every[name] for name in names}
    objectives = {
        "text": NextToken(),
        "image": Masked(steps=2),
        "speech": NextToken(),
        "video": Masked(steps=2),
    }
    decoder = DecoderConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=16)
    config = ModelConfig(decoder=decoder, objectives={name: objectives[name] for name in names})
    free = {name: {"max_new_tokens": 8} for name in names if name in ("text", "speech")}
    return LoadedModel(UnifiedModel(config, build_vocabulary(tokenizers)), tokenizers, {"modalities": free})


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model(("text", "image", "speech", "video"))


class Answering(Model):
    """A model whose replies are given by a rule instead of sampled."""

    def __init__(self, loaded: LoadedModel, answer: Answer) -> None:
        super().__init__(loaded)
        self.answer = answer

    def generate_batch(  # type: ignore[override]
        self, prompts: Sequence[Any], to: str, *, seed: int = 0, **keywords: Any
    ) -> list[Reply]:
        return [Reply((self.answer(prompt, to),), seed) for prompt in prompts]


class Knowing(Model):
    """Replies with the real held-out item that belongs to each prompt; with another drawing or recording of the same
    digit where that would be the prompt itself."""

    def __init__(self, loaded: LoadedModel, world: World) -> None:
        super().__init__(loaded)
        self.world = world

    def generate_batch(  # type: ignore[override]
        self, prompts: Sequence[Any], to: str, *, seed: int = 0, **keywords: Any
    ) -> list[Reply]:
        items = self.world.cell(f"{prompts[0].modality}->{to}", None)
        targets = items.targets
        if prompts[0].modality == to and to in ("image", "speech"):
            folder = {"image": "test", "speech": "test-speech"}[to]
            places = self.world.places(folder, 40)
            others, digits = (
                self.world.read(folder, to, places),
                self.world.concepts(folder, places, motions=False).digits,
            )
            targets = [
                next(
                    other
                    for other, its_digit in zip(others, digits, strict=True)
                    if its_digit == digit and not np.array_equal(other, own)
                )
                for own, digit in zip(targets, items.concepts.digits, strict=True)
            ]
        parts = [TextPart(item) if to == "text" else DataPart(to, item) for item in targets]
        return [Reply((part,), seed) for part in parts]


@pytest.fixture(scope="module")
def known(loaded: LoadedModel, world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """What the suite says of real held-out items as replies, and the samples."""
    out = tmp_path_factory.mktemp("known") / "metrics.json"
    model = Knowing(loaded, World(loaded.tokenizers, world, "test"))
    metrics = evaluate_any_to_any(model, world, second_judge=False, out=out)
    assert json.loads(out.read_text()) == metrics
    return metrics, json.loads(out.with_name("samples.json").read_text())


def test_real_items_as_replies_reach_exactly_the_ceiling(known: tuple[dict[str, Any], Any]) -> None:
    metrics, _ = known
    assert list(metrics["cells"]) == list(CELLS)
    assert metrics["missing"] == []
    for name, cell in metrics["cells"].items():
        source, _, target = name.partition("->")
        if target == "text":
            assert cell["accuracy"] == 1  # captions name what they name; the judge of the source is the ceiling
            assert cell["ceiling"] == 1 if source == "text" else 0.6 < cell["ceiling"] <= 1
        elif source == target != "video":
            assert cell["accuracy"] > 0.6
        else:
            assert cell["accuracy"] == cell["ceiling"] > 0.6
            assert cell["of_ceiling"] == 1
        if target != "text":
            assert cell["copy_rate"] is not None
        assert cell["copy_of_source_rate"] == (0 if source == target else None)
        assert cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1] + 1e-12
    assert metrics["cells"]["text->text"]["ceiling"] == 1
    goes_on = metrics["cells"]["video->video"]["continues"]
    assert goes_on["accuracy"] == goes_on["ceiling"] == 1
    # Every clip that goes on begins in the middle of the field: other items begin there too, save for their ink.
    assert 0 < goes_on["shuffled"]["accuracy"] < 1


def test_right_answers_to_other_items_are_right_by_chance(known: tuple[dict[str, Any], Any]) -> None:
    for name, cell in known[0]["cells"].items():
        assert cell["controls"]["shuffled"]["n"] == cell["n"]
        assert cell["controls"]["shuffled"]["accuracy"] < cell["chance"] + 0.02, name
        assert cell["controls"]["noise"]["accuracy"] < cell["chance"] + 0.05, name


def test_cells_that_say_a_motion_are_scored_by_it(known: tuple[dict[str, Any], Any]) -> None:
    moving = {"text->video", "video->text", "speech->video", "video->speech", "video->video"}
    for name, cell in known[0]["cells"].items():
        assert (cell["motion"] is not None) == (cell["held_out_pairs"] is not None) == (name in moving)
        assert cell["chance"] == pytest.approx(0.02 if name in moving else 0.1)
        if name in moving:
            assert cell["accuracy"] <= min(cell["digit"]["accuracy"], cell["motion"]["accuracy"])
            assert cell["held_out_pairs"]["n"] == 5


def test_samples_can_be_looked_at_and_listened_to(known: tuple[dict[str, Any], Any]) -> None:
    metrics, samples = known
    assert list(samples) == list(CELLS)
    for name, entries in samples.items():
        source, _, target = name.partition("->")
        for entry in entries[:2]:
            for side, modality in ((entry["prompt"], source), (entry["reply"], target)):
                assert list(side) == [modality]
                if modality == "text":
                    assert digit_of_text(side["text"]) == entry["expected"]["digit"]
                    continue
                file = base64.b64decode(side[modality].partition(";base64,")[2])
                if modality == "image":
                    assert Image.open(io.BytesIO(file)).size == (16, 16)
                elif modality == "speech":
                    assert len(read_audio(file, 16_000)) > 1000
                else:
                    assert read_video(file, fps=None, max_frames=64).frames.shape[:3] == (9, 32, 32)
        shown = sum(entry["right"] for entry in entries)
        if metrics["cells"][name]["n"] == len(entries):
            assert metrics["cells"][name]["accuracy"] == pytest.approx(shown / len(entries))


def test_one_answer_for_everything_scores_chance(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Answering(loaded, lambda _prompt, _to: TextPart("two")), world, cells=["image->text"])
    cell = metrics["cells"]["image->text"]
    digits = np.array([sample.metadata["digit"] for sample in ShardReader(world / "test")])
    assert cell["accuracy"] == pytest.approx((digits == 2).mean())
    assert cell["macro_accuracy"] == pytest.approx(cell["chance"]) == pytest.approx(0.1)
    assert cell["per_class"]["2"] == {"accuracy": 1.0, "n": int((digits == 2).sum())}
    assert 0.9 < cell["ceiling"] < 1


def test_naming_no_digit_is_wrong(loaded: LoadedModel, world: Path) -> None:
    metrics = evaluate_any_to_any(Answering(loaded, lambda _prompt, _to: TextPart("?")), world, cells=["text->text"])
    assert metrics["cells"]["text->text"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("target", "folder"), [("image", "train"), ("speech", "train-speech"), ("video", "train-video")]
)
def test_train_items_as_replies_are_found_to_be_copies(
    loaded: LoadedModel, world: Path, target: str, folder: str
) -> None:
    item = World(loaded.tokenizers, world, "train").read(folder, target, (0,))[0]
    shown = loaded.tokenizers[target].decode(loaded.tokenizers[target].encode(item))
    model = Answering(loaded, lambda _prompt, to: DataPart(to, shown))
    cell = f"text->{target}"
    scored = evaluate_any_to_any(model, world, cells=[cell], limit=10, second_judge=False)["cells"][cell]
    assert scored["copy_rate"] == 1
    assert scored["copy_rate_train"] > 0.9
    assert scored["copy_rate_held_out"] < 0.5


def test_prompts_say_what_is_expected_of_replies(loaded: LoadedModel, world: Path) -> None:
    held_out = World(loaded.tokenizers, world, "test")
    judges = Judges(held_out)
    for cell in CELLS:
        items = held_out.cell(cell, 20)
        judged = judges[cell.partition("->")[0]].judge(items.sources, motions=items.concepts.motions is not None)
        assert items.concepts.agree(judged).mean() > 0.6, cell


def test_the_first_items_hold_as_many_of_each_digit(loaded: LoadedModel, world: Path) -> None:
    held_out = World(loaded.tokenizers, world, "test")
    for folder in ("test", "test-moving-concepts", "test-continued", "test-speech"):
        every = held_out.places(folder, None)
        assert sorted(every) == list(range(len(ShardReader(world / folder))))
        some = held_out.places(folder, 20)
        assert some == every[:20]
        assert [held_out.metadata(folder, place)["digit"] for place in some].count(7) == 2
        assert len({held_out.metadata(folder, place)["digit"] for place in some}) == 10
    motions = [held_out.metadata("test-continued", place)["motion"] for place in held_out.places("test-continued", 10)]
    assert set(motions) == set(MOTIONS)


def test_a_clip_handed_back_goes_on_only_where_it_stands_still(
    loaded: LoadedModel, world: Path, tmp_path: Path
) -> None:
    model, out = Answering(loaded, lambda prompt, to: DataPart(to, prompt.data)), tmp_path / "metrics.json"
    cell = evaluate_any_to_any(model, world, cells=["video->video"], limit=20, out=out)["cells"]["video->video"]
    entries = json.loads(out.with_name("samples.json").read_text())["video->video"]
    still = [entry["expected"]["motion"] == "still" for entry in entries]
    assert 0 < sum(still) < len(entries) == cell["n"] == 20
    assert cell["digit"]["accuracy"] > 0.8
    assert cell["motion"]["accuracy"] > 0.8
    assert cell["continues"]["accuracy"] == np.mean(still)
    assert cell["continues"]["ceiling"] == 1
    assert cell["continues"]["shuffled"]["accuracy"] < 0.5
    assert all(entry["right"] <= stands for entry, stands in zip(entries, still, strict=True))
    assert 0 < cell["accuracy"] <= np.mean(still) < cell["ceiling"]


def test_an_echo_of_the_prompt_is_no_answer(loaded: LoadedModel, world: Path) -> None:
    echo = Answering(loaded, lambda prompt, _to: TextPart(f" {str(prompt.data).upper()}!"))
    cell = evaluate_any_to_any(echo, world, cells=["text->text"])["cells"]["text->text"]
    assert (cell["accuracy"], cell["copy_of_source_rate"], cell["digit"]["accuracy"]) == (0, 1, 1)
    assert repeats(["7", "the digit seven"], ["seven", "The digit  seven."]).tolist() == [False, True]


def test_a_judge_that_cannot_hear_is_found_before_anything_is_generated(world: Path) -> None:
    def never(_prompt: ContentPart, _to: str) -> ContentPart:
        raise AssertionError

    loaded = loaded_model(("text", "speech"), sample_rate=8000)
    with pytest.raises(OmniformError, match="speech tokenizer has 8000 Hz, but judges of speech hear 16000"):
        evaluate_any_to_any(Answering(loaded, never), world, cells=["text->text", "text->speech"])


@pytest.mark.parametrize("cell", ["image->image", "speech->speech"])
def test_a_copy_of_its_source_is_no_answer(loaded: LoadedModel, world: Path, cell: str) -> None:
    def repeat(prompt: ContentPart, to: str) -> ContentPart:
        tokenizer = loaded.tokenizers[to]
        return DataPart(to, tokenizer.decode(tokenizer.encode(prompt.data)))

    metrics = evaluate_any_to_any(Answering(loaded, repeat), world, cells=[cell], limit=4, second_judge=False)
    assert metrics["cells"][cell]["copy_of_source_rate"] == 1
    assert metrics["cells"][cell]["accuracy"] == 0


def test_figures_repeat_and_are_those_of_the_samples(loaded: LoadedModel, world: Path, tmp_path: Path) -> None:
    model, out = Model(loaded), tmp_path / "metrics.json"
    keywords: dict[str, Any] = {"split": "validation", "limit": 6, "cells": ["text->image", "speech->text"]}
    metrics = evaluate_any_to_any(model, world, **keywords, out=out)
    assert evaluate_any_to_any(model, world, **keywords) == metrics
    assert {cell["n"] for cell in metrics["cells"].values()} == {6}
    for name, entries in json.loads((tmp_path / "samples.json").read_text()).items():
        assert metrics["cells"][name]["accuracy"] == pytest.approx(sum(entry["right"] for entry in entries) / 6)


def test_processes_that_share_the_cells_score_as_one(loaded: LoadedModel, world: Path, tmp_path: Path) -> None:
    model = Model(loaded)
    keywords: dict[str, Any] = {"limit": 4, "cells": ["text->image", "speech->text", "image->image", "text->text"]}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of them has
    try:
        alone = evaluate_any_to_any(model, world, **keywords, out=tmp_path / "alone.json")
    finally:
        torch.set_num_threads(n_threads)
    samples = (tmp_path / "samples.json").read_text()
    assert evaluate_any_to_any(model, world, **keywords, out=tmp_path / "shared.json", workers=2) == alone
    assert list(alone["cells"]) == keywords["cells"]
    assert (tmp_path / "shared.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert (tmp_path / "samples.json").read_text() == samples


def test_what_a_model_has_not_is_named_and_the_rest_is_scored(world: Path) -> None:
    model = Model(loaded_model(("text", "image")))
    metrics = evaluate_any_to_any(model, world, limit=2)
    assert list(metrics["cells"]) == ["text->text", "text->image", "image->text", "image->image"]
    assert World(model.tokenizers, world, "validation").why_not("text->text") == "the world has no validation-text"
    reasons = {entry["cell"]: entry["reason"] for entry in metrics["missing"]}
    assert {*metrics["cells"], *reasons} == set(CELLS)
    assert reasons["text->speech"] == "the model has no speech"
    assert reasons["speech->video"] == "the model has no speech and no video"
    with pytest.raises(OmniformError, match="text->speech: the model has no speech"):
        evaluate_any_to_any(model, world, cells=["text->speech"])


def test_a_model_that_learnt_subsets_is_asked_from_each_modality_to_the_others(world: Path) -> None:
    loaded = loaded_model(("text", "image"))
    subsets = {"any": AnySubset(input_budget=8, target_budget=8)}
    network = UnifiedModel(replace(loaded.model.config, subsets=subsets), loaded.model.vocabulary)
    model = Model(replace(loaded, model=network))
    metrics = evaluate_any_to_any(model, world, limit=2)
    assert list(metrics["cells"]) == ["text->image", "image->text"]
    reasons = {entry["cell"]: entry["reason"] for entry in metrics["missing"]}
    assert {*metrics["cells"], *reasons} == set(CELLS)
    assert reasons["video->video"] == "the model has no video"
    with pytest.raises(OmniformError, match="text->text: the model learnt subsets, in which each modality comes once"):
        evaluate_any_to_any(model, world, cells=["text->text", "text->image"])


def test_data_that_the_suite_cannot_score_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train") as writer:
        writer.write(RawSample("0", (RawSpan("text", text="seven"),)))
    with pytest.raises(OmniformError, match="text->image: the world has no test;"):
        evaluate_any_to_any(Model(loaded), tmp_path)
    with ShardWriter(tmp_path / "test-text") as writer:
        writer.write(RawSample("0", (RawSpan("text", text="seven"),)))
    with pytest.raises(OmniformError, match="sample 0 says no digit to score by"):
        evaluate_any_to_any(Model(loaded), tmp_path)


def test_cells_say_by_way_of_what_they_were_scored(world: Path, tmp_path: Path) -> None:
    model = loaded_model(("text", "image"))
    ways = {"through": {"image": {"image": "text"}}}
    model = LoadedModel(model.model, model.tokenizers, {**model.generation_config, **ways})
    keywords: dict[str, Any] = {"cells": ["text->image", "image->image"], "limit": 2, "seed": 3}
    metrics = evaluate_any_to_any(Model(model), world, **keywords, out=tmp_path / "metrics.json")
    straight = evaluate_any_to_any(Model(model), world, **keywords, direct=True)
    assert {name: cell["through"] for name, cell in metrics["cells"].items()} == {
        "text->image": [],
        "image->image": ["text"],
    }
    assert "by way of text: image->image" in cells_as_text(metrics)
    assert all(cell["through"] == [] for cell in straight["cells"].values())
    assert "by way" not in cells_as_text(straight)
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert [list(part) for part in samples["image->image"][0]["through"]] == [["text"]]
    samples["image->image"][0]["through"][0]["text"] = "a <seven>"  # what random weights write is no clean text
    assert "<span>a &lt;seven&gt;</span>" in samples_section(samples)


def test_settings_of_a_target_are_passed_on(loaded: LoadedModel, world: Path) -> None:
    with pytest.raises(OmniformError, match="temperature is -1"):
        evaluate_any_to_any(
            Model(loaded), world, cells=["image->text"], limit=2, sampling={"text": {"temperature": -1}}
        )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cells": ["text->smell"]}, "unknown cells text->smell, expected some of text->text, text->image"),
        ({"split": "train"}, "split is 'train', expected a held-out one"),
        ({"data_dir": Path("nowhere"), "out": Path(".")}, r"out is the folder \., expected a file"),
        ({"data_dir": Path("nowhere")}, "nowhere holds no world: expected the folder that"),
    ],
)
def test_bad_arguments_are_named(loaded: LoadedModel, world: Path, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        evaluate_any_to_any(Model(loaded), **{"data_dir": world, **keywords})
