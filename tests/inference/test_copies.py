"""Copies against a slow oracle, and on real drawings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from omniform.data.handwritten_digits import SPLIT_ROWS, load_digit_images, warped
from omniform.errors import OmniformError
from omniform.inference.copies import CopyDetector


@given(seed=st.integers(0, 2**16), n_train=st.integers(2, 30), n=st.integers(1, 20))
def test_copies_are_those_of_a_slow_oracle(seed: int, n_train: int, n: int) -> None:
    random = np.random.default_rng(seed)
    train, items = random.normal(size=(n_train, 2, 2)), random.normal(size=(n, 2, 2))
    apart = [min(np.linalg.norm(a - b) for b in np.delete(train, i, 0)) for i, a in enumerate(train)]
    nearest = [min(np.linalg.norm(item - b) for b in train) for item in items]
    assert np.array_equal(CopyDetector.fit(train).find(items), np.array(nearest) < np.percentile(apart, 5))
    shown = np.concatenate([train, train + random.normal(scale=0.1, size=train.shape)])
    nearest = [min(np.linalg.norm(item - b) for b in shown) for item in items]
    detector = CopyDetector.fit(shown, train)
    assert np.array_equal(detector.find(items), np.array(nearest) < np.percentile(apart, 5))
    away = [float(np.linalg.norm(item - other)) for item, other in zip(items, items[::-1], strict=True)]
    assert np.array_equal(detector.alike(items, items[::-1]), np.array(away) < np.percentile(apart, 5))


def test_altered_train_items_that_were_shown_are_copies_too() -> None:
    drawings = load_digit_images()[0]
    originals = drawings[SPLIT_ROWS["train"]]
    altered = np.stack([warped(image, 5, 1.05, (0.5, -0.5)) for image in originals[:100]])
    assert CopyDetector.fit(originals).find(altered).mean() < 0.1  # which is why the altered ones must be looked at
    detector = CopyDetector.fit(np.concatenate([originals, altered]), originals)
    assert detector.find(altered).all()
    assert detector.find(drawings[SPLIT_ROWS["test"]]).mean() < 0.1


def test_train_items_are_copies_and_other_writers_are_not() -> None:
    images = load_digits().images
    detector = CopyDetector.fit(images[:1415])
    assert detector.find(images[:300]).all()
    assert detector.find(images[1545:]).mean() < 0.1
    assert len(detector.find(images[:0])) == 0
    with pytest.raises(OmniformError, match="expected at least"):
        CopyDetector.fit(images[:1])
