"""Judges: what tells whether a generated item shows what was asked for. Fitted on train rows only.

Judges of pictures see all of them at JUDGED_SIZE pixels, so that models with pictures of different sizes compare.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from omniform.errors import OmniformError

# As in "this is seven" or "an 8"; the same words as in the captions.
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = ("still", "left", "right", "up", "down")
NO_ANSWER = -1  # of a judge that may find none
DIGIT_OF = {name: digit for digit, word in enumerate(DIGIT_WORDS) for name in (word, str(digit))}
JUDGED_SIZE = 16  # pixels per side


def at_judged_size(images: Float[np.ndarray, "N H W"]) -> Float[np.ndarray, "N 16 16"]:
    """Return square images at JUDGED_SIZE: each pixel is the mean of the area that it covers; those that are of that
    size already are returned as they are.

    Raises:
        OmniformError: not square, or not a multiple of JUDGED_SIZE pixels per side.
    """
    height, width = images.shape[1:]
    if height != width or height == 0 or height % JUDGED_SIZE:
        raise OmniformError(
            f"images of {width} x {height} pixels cannot be judged: expected squares of {JUDGED_SIZE} pixels per side, "
            "or of a multiple of it: choose such an image_size for the image tokenizer"
        )
    factor = height // JUDGED_SIZE
    if factor == 1:
        return images
    return images.reshape(len(images), JUDGED_SIZE, factor, JUDGED_SIZE, factor).mean(axis=(2, 4))


@dataclass(frozen=True)
class DigitImageJudge:
    """Which digit an image shows: a support vector machine with a Gaussian kernel on the pixels at JUDGED_SIZE.

    C = 10 and gamma = 0.05 on pixels scaled to [0, 1]; settings were chosen on validation rows.
    """

    machine: Any

    @classmethod
    def fit(cls, images: Float[np.ndarray, "N H W"], labels: Int[np.ndarray, "N"]) -> Self:
        """Learn from real train images in [-1, 1] and the digits that they show.

        Raises:
            OmniformError: scikit-learn is not installed, or images of a size that `at_judged_size` refuses.
        """
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise OmniformError("the image judge needs scikit-learn: install omniform[demo]") from error
        return cls(SVC(C=10, gamma=0.05, cache_size=512).fit(_features(images), labels))

    def predict(self, images: Float[np.ndarray, "N H W"]) -> npt.NDArray[np.int64]:
        """Return the digit that each image in [-1, 1] shows best; a judge never abstains."""
        return np.asarray(self.machine.predict(_features(images)), dtype=np.int64)


def digit_of_text(text: str) -> int | None:
    """Return the digit that a text names, as a word or a numeral; None where it names none or more than one digit.

    Naming one digit twice counts as naming it. A numeral of more than one figure names none of its figures.
    """
    words = re.findall(r"[a-z]+|[0-9]+", text.lower())
    if any(word.isdigit() and len(word) > 1 for word in words):
        return None
    named = {DIGIT_OF[word] for word in words if word in DIGIT_OF}
    return named.pop() if len(named) == 1 else None


def motion_of_text(text: str) -> str | None:
    """Return the one of MOTIONS that a text names, as in "moving left"; None where it names none or several."""
    named = set(re.findall(r"[a-z]+", text.lower())) & set(MOTIONS)
    return named.pop() if len(named) == 1 else None


def wilson_interval(n_right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion, 95% for the default z (Wilson 1927, JASA 22:209).

    Raises:
        OmniformError: n is 0, or n_right is not in [0, n].
    """
    if not 0 <= n_right <= n or n == 0:
        raise OmniformError(f"{n_right} right of {n}: expected at least one trial, and no more right than tried")
    rate, scale = n_right / n, 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / scale
    reach = z / scale * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def difference_interval(n_right: int, n: int, other_right: int, other_n: int) -> tuple[float, float]:
    """Return a 95% interval of the difference of two proportions of independent trials, the first less the other.

    The hybrid score interval: Wilson intervals combined (Newcombe 1998, Statistics in Medicine 17:873, method 10).

    Raises:
        OmniformError: impossible counts, see `wilson_interval`.
    """
    (low, high), (other_low, other_high) = wilson_interval(n_right, n), wilson_interval(other_right, other_n)
    rate, other = n_right / n, other_right / other_n
    below, above = math.hypot(rate - low, other_high - other), math.hypot(high - rate, other - other_low)
    return rate - other - below, rate - other + above


def _features(images: Float[np.ndarray, "N H W"]) -> Float[np.ndarray, "N F"]:
    return (at_judged_size(np.asarray(images, dtype=np.float64)).reshape(len(images), -1) + 1) / 2
