"""Locations beside text and image through the whole road: scenes, training, a stored model, generation, files."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import omniform
from omniform.data.digit_scenes import KINDS, scene_samples
from omniform.data.handwritten_digits import load_digit_images
from omniform.data.loader import TrainingData
from omniform.data.mixture import DataConfig, SourceConfig
from omniform.data.shards import ShardReader, ShardWriter
from omniform.inference.generate import Model
from omniform.inference.part_files import read_part, write_part
from omniform.inference.protocol import DataPart
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.folder import build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.tokenizers.codecs.fsq import FSQConfig
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.tokenizers.locations import Location, LocationTokenizer, LocationTokenizerConfig
from omniform.tokenizers.text import SentencePieceTokenizer
from omniform.training.config import CheckpointConfig, EngineConfig, FitConfig, OptimConfig
from omniform.training.loop import fit
from omniform.training.model_task import ModelTask
from omniform.training.run_folder import open_run_folder

BENCH = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "locations.py"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with a scene of each kind and digit."""
    folder = tmp_path_factory.mktemp("scenes")
    images, labels = load_digit_images()
    for kind in KINDS:
        with ShardWriter(folder / kind) as writer:
            for sample in scene_samples(kind, images, labels, "validation", 0, 1, limit=1):
                writer.write(sample)
    return folder


@pytest.fixture(scope="module")
def model(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of three steps, stored and loaded: it knows next to nothing."""
    torch.manual_seed(0)
    image = ImageTokenizerConfig(image_size=32, patch_size=8, widths=(8,), quantizer=FSQConfig(levels=(4, 3)))
    tokenizers = {
        "text": SentencePieceTokenizer.train(["where is the seven"], vocab_size=270),
        "image": ImageTokenizer(image, image.build()),
        "location": LocationTokenizer(LocationTokenizerConfig(n_bins=9)),
    }
    objectives = {"text": NextToken(), "image": Masked(steps=2), "location": NextToken()}
    decoder = DecoderConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=32, rope_theta=100.0)
    config = ModelConfig(decoder=decoder, objectives=objectives)
    vocabulary = build_vocabulary(tokenizers)
    tasks = {"find": "image+text->location", "draw": "text+location->image"}
    sources = tuple(SourceConfig(path=scenes / kind, tasks={task: 1.0}) for kind, task in tasks.items())
    folder = tmp_path_factory.mktemp("model")
    data = TrainingData(
        DataConfig(sources=sources, row_length=128),
        tokenizers,
        vocabulary,
        objectives,
        seed=0,
        cache_dir=folder / "tokens",
        rows_per_step=4,
    )
    assert not any(data.holes.values())
    task = ModelTask(
        UnifiedModel(config, vocabulary), data, tokenizers, micro_batch_rows=4, generation_config={}, card="A toy."
    )
    counts = [batch.counts for step in range(3) for batch in task.micro_batches(step, 0, 1)]
    assert all(sum(count[modality] for count in counts) > 0 for modality in ("image", "location"))
    settings = FitConfig(
        name="toy",
        steps=3,
        rows_per_step=4,
        optim=OptimConfig(lr=1e-3, ema_decay=None),
        engine=EngineConfig(micro_batch_rows=4, precision="fp32"),
        checkpoint=CheckpointConfig(every=3),
    )
    open_run_folder(folder / "run", settings)
    return omniform.load(fit(task, settings, folder / "run"))


def test_whatever_is_drawn_is_a_list_of_locations(model: Model) -> None:
    replies = model.generate_batch(["find the 7"] * 64, "location", seed=0, temperature=2.0, max_new_tokens=16)
    answers = [reply.parts[0].data for reply in replies]
    assert all(isinstance(location, Location) for answer in answers for location in answer)
    assert {location.kind for answer in answers for location in answer} == {"box", "keypoint", "polygon"}


def test_locations_are_read_from_and_written_to_files(model: Model, tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text('[{"box": [0.5, 0, 1, 0.5]}]')
    part = read_part(tmp_path / "here.json", model)
    assert part == DataPart("location", (Location.box(0.5, 0, 1, 0.5),), part.json)
    assert model.generate(["draw a three here", part], to="image", seed=0).images[0].size == (32, 32)
    [answer] = model.generate("find the 7", to="location", seed=0, max_new_tokens=24).parts
    write_part(answer, tmp_path / "there.json")
    assert read_part(tmp_path / "there.json", model).data == answer.data


def test_figures_of_a_model_that_knows_nothing_are_near_chance(model: Model, scenes: Path) -> None:
    find = BENCH["score_find"](model, list(ShardReader(scenes / "find")))
    draw = BENCH["score_draw"](model, list(ShardReader(scenes / "draw")))
    assert find["n"] == draw["n"] == 10
    assert max(find["accuracy"], find["chance"]) < 0.5
    assert draw["real"] > 0.8
    assert draw["accuracy"] < draw["real"]
    assert draw["ink_outside"] > 0.5  # three quarters of a picture lie outside of a box


EDGES = st.tuples(st.integers(0, 31), st.integers(1, 32)).filter(lambda edges: edges[0] < edges[1])


@given(x=st.tuples(EDGES, EDGES), y=st.tuples(EDGES, EDGES))
def test_overlap_is_that_of_the_pixels(x: tuple, y: tuple) -> None:
    masks = np.zeros((2, 32, 32), bool)
    for mask, (left, right), (upper, lower) in zip(masks, x, y, strict=True):
        mask[upper:lower, left:right] = True
    one, other = [(left, upper, right, lower) for (left, right), (upper, lower) in zip(x, y, strict=True)]
    assert BENCH["overlap"](one, other) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    assert BENCH["overlap"](None, other) == 0


def test_ink_outside_is_the_part_of_the_light_that_the_box_leaves_out() -> None:
    picture = torch.full((1, 32, 32), -1.0)
    picture[:, :16, :16] += 0.5
    assert BENCH["ink_outside"]([picture], [(0, 0, 16, 16)]) == pytest.approx(0)
    assert BENCH["ink_outside"]([picture], [(0, 0, 8, 16)]) == pytest.approx(0.5)
    assert BENCH["ink_outside"]([picture], [(16, 16, 32, 32)]) == pytest.approx(1)


def test_answers_dealt_out_are_right_as_often_as_all_pairs_are() -> None:
    right = np.random.default_rng(0).random((50, 50)) < 0.3
    assert BENCH["dealt"](right) == pytest.approx(right.mean(), abs=0.02)
