"""Copies: which generated items lie nearer to what training showed than training items lie to each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from omniform.errors import OmniformError

N_NEAREST = 4  # train items that an item is compared with after the tokenizer's round trip
N_MEASURED = 50  # originals whose distances set the bound
_CHUNK = 1024  # rows of one distance matrix, which bounds memory
_PERCENTILE = 5

Decoded = Callable[[Int[np.ndarray, "R"]], Float[np.ndarray, "R F"]]


@dataclass(frozen=True)
class CopyDetector:
    """Tells copies from new items by Euclidean distance: a copy is nearer to its nearest train item than 95% of the
    original train items are to their nearest other one. Items that another one equals to the last number bound nothing.

    What is compared has been through the same tokenizer, or its loss alone would keep it apart. As that takes long for
    all train items, it is done with the N_NEAREST alone that are nearest to it among `train`.

    Attributes:
        train: everything that training showed, after the round trip, or as it is where that takes too long.
        decoded: what the tokenizer makes of the train items at some places.
        bound: items nearer than this are copies.
    """

    train: Float[np.ndarray, "T F"]
    decoded: Decoded
    bound: float

    @classmethod
    def fit(
        cls, train: Float[np.ndarray, "T F"], decoded: Decoded, originals: npt.NDArray[np.int64] | None = None
    ) -> Self:
        """Learn from the first N_MEASURED originals how near train items are to each other.

        Args:
            originals: the places of those that were not made from others of `train`, which would be nearer to each
                other than any two originals are; all unless given.

        Raises:
            OmniformError: no train items, or fewer than two originals.
        """
        originals = np.arange(len(train)) if originals is None else originals
        if len(train) == 0 or len(originals) < 2:
            raise OmniformError(
                f"copies of {len(train)} train items, {len(originals)} of them originals: expected at least 1, and 2"
            )
        measured = originals[:N_MEASURED]
        apart = _distances(decoded(measured), train, decoded, originals, measured)
        # Train items that their tokenizer makes the same, such as one drawing at rest twice, would bound nothing.
        different = apart[apart > 0]
        bound = np.percentile(different, _PERCENTILE) if len(different) else np.nextafter(0.0, 1.0)
        return cls(train, decoded, float(bound))

    def find(self, items: Float[np.ndarray, "N F"]) -> Bool[np.ndarray, "N"]:
        """Return which items are copies of a train item."""
        return _distances(items, self.train, self.decoded, np.arange(len(self.train))) < self.bound

    def alike(self, items: Float[np.ndarray, "N F"], others: Float[np.ndarray, "N F"]) -> Bool[np.ndarray, "N"]:
        """Return which items are copies of the other item that stands at the same place."""
        return np.asarray(np.linalg.norm(items - others, axis=1) < self.bound)


def _distances(
    items: Float[np.ndarray, "N F"],
    train: Float[np.ndarray, "T F"],
    decoded: Decoded,
    among: npt.NDArray[np.int64],
    own: npt.NDArray[np.int64] | None = None,
) -> Float[np.ndarray, "N"]:
    """Return each item's distance to the nearest of the train items at the places `among`; the one at its `own` place
    does not count."""
    if not len(items):
        return np.zeros(0)
    own = np.full(len(items), -1) if own is None else own
    known, count = train[among], min(N_NEAREST, len(among))
    sizes, near = (known**2).sum(1), list[npt.NDArray[Any]]()
    for first in range(0, len(items), _CHUNK):
        chunk = items[first : first + _CHUNK]
        squares = sizes - 2 * chunk @ known.T  # less those of the items themselves, which change no order
        squares[own[first : first + _CHUNK, None] == among] = np.inf
        near.append(among[np.argpartition(squares, count - 1, axis=1)[:, :count]])
    candidates = np.concatenate(near)
    distinct, places = np.unique(candidates, return_inverse=True)
    shown = decoded(distinct)[places.reshape(candidates.shape)]
    apart = np.linalg.norm(items[:, None] - shown, axis=-1)
    return np.asarray(np.where(candidates == own[:, None], np.inf, apart).min(1), dtype=np.float64)
