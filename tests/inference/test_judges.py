"""Judges against closed forms and slow oracles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images
from omniform.errors import OmniformError
from omniform.inference.judges import (
    DigitImageJudge,
    at_judged_size,
    difference_interval,
    digit_of_text,
    motion_of_text,
    wilson_interval,
)


def test_the_image_judge_knows_held_out_writers() -> None:
    levels, labels = load_digit_images()
    images = levels / np.float32(127.5) - 1
    train, validation = SPLIT_ROWS["train"], SPLIT_ROWS["validation"]
    judge = DigitImageJudge.fit(images[train], labels[train])
    assert (judge.predict(images[validation]) == labels[validation]).mean() > 0.95
    shuffled = np.random.default_rng(0).permuted(images[validation].reshape(130, -1), axis=1).reshape(130, 16, 16)
    assert (judge.predict(shuffled) == labels[validation]).mean() < 0.25  # chance is 0.1


def test_enlarged_images_are_judged_as_the_originals_are() -> None:
    images = load_digit_images()[0][:40].astype(np.float32)
    assert at_judged_size(images) is images
    assert np.array_equal(at_judged_size(images.repeat(3, axis=1).repeat(3, axis=2)), images)
    block = np.arange(32 * 32.0).reshape(1, 32, 32)
    assert at_judged_size(block)[0, 3, 5] == block[0, 6:8, 10:12].mean()
    labels = load_digit_images()[1][:40]
    judge = DigitImageJudge.fit(images / 127.5 - 1, labels)
    enlarged = images.repeat(2, axis=1).repeat(2, axis=2) / 127.5 - 1
    assert np.array_equal(judge.predict(enlarged), judge.predict(images / 127.5 - 1))


@pytest.mark.parametrize("size", [(8, 8), (24, 24), (16, 32), (0, 0)])
def test_images_of_other_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(OmniformError, match=f"{size[1]} x {size[0]} pixels cannot be judged"):
        at_judged_size(np.zeros((2, *size)))


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("seven", 7),
        ("7", 7),
        ("This is an 8.", 8),
        ("a handwritten Zero", 0),
        ("3: three", 3),
        ("", None),
        ("no digit", None),
        ("seven or eight", None),
        ("1 2", None),
        ("17", None),
        ("someone phoned", None),
        ("7th", 7),
    ],
)
def test_the_digit_that_a_text_names(text: str, digit: int | None) -> None:
    assert digit_of_text(text) == digit


@given(n=st.integers(1, 400), share=st.floats(0, 1))
def test_the_interval_is_scipys(n: int, share: float) -> None:
    right = round(n * share)
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((56, 70, 48, 80), (0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.1705, 0.8090)),
        ((6, 7, 2, 7), (0.0582, 0.8062)),
        ((5, 56, 0, 29), (-0.0381, 0.1926)),
        ((0, 10, 0, 20), (-0.1611, 0.2775)),
        ((10, 10, 0, 20), (0.6791, 1.0)),
    ],
)
def test_the_interval_of_a_difference_is_newcombes(
    counts: tuple[int, int, int, int], expected: tuple[float, float]
) -> None:
    """Table II of the source."""
    assert difference_interval(*counts) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(
    ("text", "motion"),
    [
        ("seven moving left", "left"),
        ("this is an 8 standing still", "still"),
        ("Up, UP!", "up"),
        ("moving left and right", None),
        ("seven", None),
        ("upright", None),
        ("", None),
    ],
)
def test_a_text_names_one_motion_or_none(text: str, motion: str | None) -> None:
    assert motion_of_text(text) == motion


def test_impossible_counts_are_refused() -> None:
    for right, n in ((0, 0), (-1, 4), (5, 4)):
        with pytest.raises(OmniformError, match="right of"):
            wilson_interval(right, n)
