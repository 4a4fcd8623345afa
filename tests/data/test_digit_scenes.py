"""Scenes show and say what their metadata say, with drawings and wordings of their split."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniform.data.digit_scenes import KINDS, PLACES, SceneKind, scene_samples
from omniform.data.handwritten_digits import SPLIT_ROWS, altered, load_digit_images
from omniform.data.shards import ShardReader
from omniform.data.templates import SCENES, WORDS, render

SEED, LIMIT, COPIES = 3, 2, 3  # of the world
SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", SCENES)
def test_scenes_show_the_drawings_of_their_split_where_they_say(world: Path, kind: str, split: str) -> None:
    images, labels = load_digit_images()
    samples = list(ShardReader(world / f"{split}-{kind}"))
    assert Counter(sample.metadata["digit"] for sample in samples) == dict.fromkeys(range(10), LIMIT)
    for sample in samples:
        said = sample.metadata
        shown = [said, said["other"]] if kind == "find" else [said]
        expected = np.zeros((32, 32), np.uint8)
        for one in shown:
            assert one["row"] in SPLIT_ROWS[split]
            assert one["copy"] in range(COPIES if split == "train" else 1)
            assert one["digit"] == labels[one["row"]]
            x0, y0, x1, y1 = one["box"]
            assert (x1 - x0, y1 - y0) == (16, 16)
            assert (x0, y0) in PLACES
            assert not expected[y0:y1, x0:x1].any()  # nothing was drawn there before
            expected[y0:y1, x0:x1] = altered(images, one["row"], one["copy"], SEED)[0]
        assert len({one["digit"] for one in shown}) == len(shown)
        spans = {span.modality: span for span in sample.spans}
        order = ["image", "text", "location"] if kind == "find" else ["text", "location", "image"]
        assert [span.modality for span in sample.spans] == order
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(spans["image"].payload or b""))), expected)
        assert json.loads(spans["location"].payload or b"") == [{"box": [edge / 32 for edge in said["box"]]}]
        assert spans["text"].text == render(said["template"], said["digit"])
        assert said["template"] in SCENES[kind][split == "test"]


@pytest.mark.parametrize("kind", SCENES)
def test_wordings_name_one_digit_and_those_of_test_are_other_ones_of_known_words(kind: str) -> None:
    train, test = SCENES[kind]
    assert not set(train) & set(test)
    texts = {template: [render(template, digit) for digit in range(10)] for template in (*train, *test)}
    for rendered in texts.values():
        for digit, text in enumerate(rendered):
            assert {*text.split()} & {*WORDS, *map(str, range(10))} in ({WORDS[digit]}, {str(digit)})
    known, used = (
        {word for t in templates for text in texts[t] for word in text.split()} for templates in (train, test)
    )
    assert used <= known


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_are_a_function_of_their_arguments(kind: SceneKind) -> None:
    images, labels = load_digit_images()
    scenes = [list(scene_samples(kind, images, labels, "validation", seed, 1, limit=1)) for seed in (0, 0, 1)]
    assert scenes[0] == scenes[1]
    assert [sample.key for sample in scenes[0]] == [sample.key for sample in scenes[2]]
    assert not {sample.spans for sample in scenes[0]} & {sample.spans for sample in scenes[2]}
