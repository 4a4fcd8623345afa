"""Copies against a slow oracle, and on real drawings."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float
from sklearn.datasets import load_digits

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images, warped
from omniform.errors import OmniformError
from omniform.inference.copies import CopyDetector


def flat(items: Float[np.ndarray, "N *S"]) -> Float[np.ndarray, "N F"]:
    return np.asarray(items, dtype=np.float64).reshape(len(items), int(np.prod(items.shape[1:])))


def exact(train: Float[np.ndarray, "T *S"], originals: npt.NDArray[np.int64] | None = None) -> CopyDetector:
    """Of items whose tokenizer loses nothing."""
    rows = flat(train)
    return CopyDetector.fit(rows, lambda places: rows[places], originals)


@given(seed=st.integers(0, 2**16), n_train=st.integers(2, 30), n=st.integers(1, 20))
def test_copies_are_those_of_a_slow_oracle(seed: int, n_train: int, n: int) -> None:
    random = np.random.default_rng(seed)
    train, items = random.normal(size=(n_train, 2, 2)), random.normal(size=(n, 2, 2))
    apart = [min(np.linalg.norm(a - b) for b in np.delete(train, i, 0)) for i, a in enumerate(train)]
    nearest = [min(np.linalg.norm(item - b) for b in train) for item in items]
    bound = np.percentile(apart, 5)
    assert np.array_equal(exact(train).find(flat(items)), np.array(nearest) < bound)
    shown = np.concatenate([train, train + random.normal(scale=0.1, size=train.shape)])
    nearest = [min(np.linalg.norm(item - b) for b in shown) for item in items]
    detector = exact(shown, np.arange(n_train))
    assert np.array_equal(detector.find(flat(items)), np.array(nearest) < bound)
    away = [float(np.linalg.norm(item - other)) for item, other in zip(items, items[::-1], strict=True)]
    assert np.array_equal(detector.alike(flat(items), flat(items[::-1])), np.array(away) < bound)


def test_a_lossy_round_trip_keeps_no_copy_apart() -> None:
    random = np.random.default_rng(0)
    train, new = random.normal(size=(2, 60, 8))

    def decoded(rows: npt.NDArray[np.int64]) -> Float[np.ndarray, "R F"]:
        return np.round(train[rows])

    detector = CopyDetector.fit(train, decoded)
    assert np.linalg.norm(train - decoded(np.arange(60)), axis=1).min() > 0.2
    assert detector.find(decoded(np.arange(60))).all()
    assert detector.find(np.round(new)).mean() < 0.2


def test_train_items_that_are_the_same_do_not_hide_copies() -> None:
    random = np.random.default_rng(0)
    train, new = random.normal(size=(40, 8)), random.normal(5, size=(40, 8))
    twice = np.concatenate([train, train[:8]])
    assert exact(twice).find(flat(train)).all()
    assert not exact(twice).find(flat(new)).any()
    alone = exact(np.zeros((5, 8)))
    assert alone.find(np.zeros((1, 8))).all()
    assert not alone.find(flat(new)).any()


def test_altered_train_items_that_were_shown_are_copies_too() -> None:
    drawings = load_digit_images()[0]
    originals = drawings[SPLIT_ROWS["train"]]
    altered = np.stack([warped(image, 5, 1.05, (0.5, -0.5)) for image in originals[:100]])
    # Which is why the altered ones must be looked at:
    assert exact(originals).find(flat(altered)).mean() < 0.1
    detector = exact(np.concatenate([originals, altered]), np.arange(len(originals)))
    assert detector.find(flat(altered)).all()
    assert detector.find(flat(drawings[SPLIT_ROWS["test"]])).mean() < 0.1


def test_train_items_are_copies_and_other_writers_are_not() -> None:
    images = load_digits().images
    detector = exact(images[:1415])
    assert detector.find(flat(images[:300])).all()
    assert detector.find(flat(images[1545:])).mean() < 0.1
    assert len(detector.find(flat(images[:0]))) == 0
    with pytest.raises(OmniformError, match="expected at least"):
        exact(images[:1])
