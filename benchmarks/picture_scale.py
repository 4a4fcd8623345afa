"""What sets of pictures are measured with on docs/objectives.md: the judge, the features, and real pictures.

All of it is fitted on real train rows of digits-world.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omniform.data.shards import ShardReader
from omniform.inference.image_metrics import FeatureSpace, Manifold, diversity, frechet_distance, jackknife_interval
from omniform.inference.judges import DigitImageJudge, at_judged_size, wilson_interval

WORLD = Path("runs/demo/data")
PERCENTILE = 5  # of the distances between train drawings, below which a picture is a copy
Pictures = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Split:
    """Real pictures (N, 16, 16) in [-1, 1], what they show, and whether they were made from another one."""

    pictures: Pictures
    digits: NDArray[np.int64]
    altered: NDArray[np.bool_]
    texts: list[str]

    @classmethod
    def read(cls, name: str) -> Self:
        """Read a folder of digits-world."""
        samples = list(ShardReader(WORLD / name))
        pictures = [to_array(Image.open(io.BytesIO(sample.spans[1].payload or b""))) for sample in samples]
        return cls(
            np.stack(pictures),
            np.array([sample.metadata["digit"] for sample in samples]),
            np.array([sample.metadata["copy"] > 0 for sample in samples]),
            [str(sample.spans[0].text) for sample in samples],
        )


class RoundTrip:
    """A tokenizer, and what it makes of the train pictures: what its loss costs, and what a copy is.

    Both sides of a comparison have been through the tokenizer, or its loss alone would keep them apart.
    """

    def __init__(self, tokenizer: Any, train: Split) -> None:
        self.tokenizer = tokenizer
        self.train = self(train.pictures)
        originals = _flat(self.train[~train.altered])
        self.bound = float(np.percentile(_nearest(originals, originals, itself=True), PERCENTILE))

    def __call__(self, pictures: Pictures) -> Pictures:
        """Encode and decode, as a drawn picture is decoded."""
        items = [self.tokenizer.from_pil(to_picture(picture)) for picture in pictures]
        decoded = self.tokenizer.decode_batch(self.tokenizer.encode_batch(items))
        return np.stack([to_array(self.tokenizer.to_pil(item)) for item in decoded])

    def n_copies(self, pictures: Pictures) -> int:
        """Count the pictures nearer to a train picture than 95 % of train drawings are to each other."""
        return int((_nearest(_flat(pictures), _flat(self.train)) < self.bound).sum())


class Scale:
    """Judge, features and references.

    Args:
        n: pictures of an arm, which is how many train pictures stand beside them.
        seed: chooses those.
        tokenizers: by name; a model draws what its own can show.
    """

    def __init__(self, n: int, seed: int, tokenizers: dict[str, Any]) -> None:
        self.train, self.test = Split.read("train"), Split.read("test")
        originals = ~self.train.altered
        self.judge = DigitImageJudge.fit(self.train.pictures, self.train.digits)
        self.space = FeatureSpace.fit(self.train.pictures[originals])
        self.shown = self.space.features(self.train.pictures)
        self.manifold = Manifold(self.shown[originals])
        self._tokenizers = tokenizers
        self.round_trip = functools.cache(lambda name: RoundTrip(self._tokenizers[name], self.train))
        # As many train pictures as an arm draws: what a perfect model would reach, and its spread within a class.
        self.sample = np.random.default_rng(seed).permutation(len(self.shown))[:n]
        self.spread = diversity(self.shown[self.sample], self.train.digits[self.sample])

    def n_right(self, pictures: Pictures, digits: NDArray[np.int64]) -> int:
        """Count the pictures that the judge reads as it should."""
        return int((self.judge.predict(pictures) == digits).sum())

    def frechet(self, pictures: Pictures) -> float:
        """Return the Fréchet distance to all train pictures."""
        return frechet_distance(self.space.features(pictures), self.shown)

    def frechet_difference(self, one: Pictures, other: Pictures) -> dict[str, Any]:
        """Return by how much the first distance exceeds the second, of pictures for the same prompts in one order."""
        of_one, of_other = self.space.features(one), self.space.features(other)
        return _with_interval(
            lambda places: (
                frechet_distance(of_one[places], self.shown) - frechet_distance(of_other[places], self.shown)
            ),
            len(one),
        )

    def measure(self, pictures: Pictures, digits: NDArray[np.int64], tokenizer: str) -> dict[str, Any]:
        """Return every figure of a set of pictures that should show these digits, with 95 % intervals.

        Args:
            tokenizer: name of that through which copies are compared.
        """
        points, n = self.space.features(pictures), len(pictures)
        right = self.n_right(pictures, digits)
        inside = self.manifold.inside(points)
        covered = int(inside.any(0).sum())
        copies = self.round_trip(tokenizer).n_copies(pictures)
        around = inside.sum(1) / self.manifold.k
        return {
            "n": n,
            "n_right": right,
            "accuracy": {"value": right / n, "ci95": wilson_interval(right, n)},
            "frechet": _with_interval(lambda places: frechet_distance(points[places], self.shown), n),
            "density": _with_interval(lambda places: float(around[places].mean()), n),
            "coverage": {
                "value": covered / len(self.manifold.points),
                "ci95": wilson_interval(covered, len(self.manifold.points)),
                "expected_of_real": self.manifold.expected_coverage(n),
            },
            "diversity": _with_interval(lambda places: diversity(points[places], digits[places]) / self.spread, n),
            "copy_rate": {"value": copies / n, "ci95": wilson_interval(copies, n)},
        }

    def floors(self) -> dict[str, Any]:
        """Return the figures of real pictures, as they are and through each tokenizer."""
        train, test, found = self.train, self.test, {}
        first = next(iter(self._tokenizers))
        digits = train.digits[self.sample]
        found["train pictures"] = self.measure(train.pictures[self.sample], digits, first)
        for name in self._tokenizers:
            decoded = self.round_trip(name).train[self.sample]
            found[f"train pictures, through {name}"] = self.measure(decoded, digits, name)
        found["held-out drawings"] = self.measure(test.pictures, test.digits, first)
        for name in self._tokenizers:
            decoded = self.round_trip(name)(test.pictures)
            found[f"held-out drawings, through {name}"] = self.measure(decoded, test.digits, name)
        return found


def to_array(picture: Image.Image) -> Pictures:
    """Return a grey picture in [-1, 1] at 16 x 16: the mean of the pixels that each covers."""
    return at_judged_size(np.asarray(picture.convert("L"), dtype=np.float32)[None] / np.float32(127.5) - 1)[0]


def to_picture(pixels: Pictures) -> Image.Image:
    """Return a 16 x 16 array in [-1, 1] as a grey picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().astype(np.uint8))


def _with_interval(statistic: Callable[[NDArray[np.int64]], float], n: int) -> dict[str, Any]:
    return {"value": statistic(np.arange(n)), "ci95": jackknife_interval(statistic, n)}


def _flat(pictures: Pictures) -> NDArray[np.float64]:
    return pictures.reshape(len(pictures), -1).astype(np.float64)


def _nearest(items: NDArray[np.float64], others: NDArray[np.float64], itself: bool = False) -> NDArray[np.float64]:
    """Return how far each item is from the nearest of the others; with `itself`, of those at other places."""
    squares, found = (others**2).sum(1), np.empty(len(items))
    for first in range(0, len(items), 256):
        chunk = items[first : first + 256]
        distances = (chunk**2).sum(1)[:, None] - 2 * chunk @ others.T + squares
        if itself:
            distances[np.arange(len(chunk)), first + np.arange(len(chunk))] = np.inf
        found[first : first + 256] = np.sqrt(np.maximum(distances.min(1), 0))
    return found
