"""Copies: which generated items lie nearer to what training showed than training items lie to each other."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float

from omniform.errors import OmniformError

_CHUNK = 1024  # rows of one distance matrix, which bounds memory
_PERCENTILE = 5


@dataclass(frozen=True)
class CopyDetector:
    """Tells copies from new items by Euclidean distance: a copy is nearer to its nearest train item than 95% of the
    original train items are to their nearest other one.

    All items must have been through the same tokenizer, or its loss alone keeps them apart.

    Attributes:
        train: everything that training showed, or a stated part of it.
        bound: items nearer than this are copies.
    """

    train: Float[np.ndarray, "T F"]
    bound: float

    @classmethod
    def fit(cls, train: Float[np.ndarray, "T *S"], originals: Float[np.ndarray, "R *S"] | None = None) -> Self:
        """Learn how near train items are to each other.

        Args:
            originals: those of `train` that were not made from others of it, which would be nearer to each other than
                any two originals are; all of `train` unless given.

        Raises:
            OmniformError: no train items, or fewer than two originals.
        """
        originals = train if originals is None else originals
        if len(train) == 0 or len(originals) < 2:
            raise OmniformError(
                f"copies of {len(train)} train items, {len(originals)} of them originals: expected at least 1, and 2"
            )
        rows = _rows(originals)
        return cls(_rows(train), float(np.percentile(_nearest_distances(rows, rows, itself=True), _PERCENTILE)))

    def find(self, items: Float[np.ndarray, "N *S"]) -> Bool[np.ndarray, "N"]:
        """Return which items are copies of a train item."""
        return _nearest_distances(_rows(items), self.train) < self.bound

    def alike(self, items: Float[np.ndarray, "N *S"], others: Float[np.ndarray, "N *S"]) -> Bool[np.ndarray, "N"]:
        """Return which items are copies of the other item that stands at the same place."""
        return np.linalg.norm(_rows(items) - _rows(others), axis=1) < self.bound


def _rows(items: Float[np.ndarray, "N *S"]) -> Float[np.ndarray, "N F"]:
    return np.asarray(items, dtype=np.float64).reshape(len(items), -1 if len(items) else 0)


def _nearest_distances(
    items: Float[np.ndarray, "N F"], train: Float[np.ndarray, "T F"], *, itself: bool = False
) -> Float[np.ndarray, "N"]:
    """Return each item's distance to the nearest train item; `itself`: items are the train items, and none counts
    as its own neighbour."""
    nearest = [np.zeros(0)]
    for first in range(0, len(items), _CHUNK):
        chunk = items[first : first + _CHUNK]
        squares = (chunk**2).sum(1)[:, None] + (train**2).sum(1) - 2 * chunk @ train.T  # (chunk, T)
        if itself:
            squares[np.arange(len(chunk)), first + np.arange(len(chunk))] = np.inf
        nearest.append(np.sqrt(squares.min(1).clip(0)))
    return np.concatenate(nearest)
