"""The judges of the any-to-any suite: one per target modality, all with one face."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor

from omniform.errors import OmniformError
from omniform.inference.evaluation_items import Concepts, World
from omniform.inference.judges import (
    MOTIONS,
    NO_ANSWER,
    DigitImageJudge,
    at_judged_size,
    digit_of_text,
    motion_of_text,
)
from omniform.inference.speech_judge import SAMPLE_RATE, SpeechJudge
from omniform.inference.video_judge import VideoJudge
from omniform.inference.whisper_judge import WhisperJudge
from omniform.tokenizers.image_files import read_picture

SECOND_OF_SPEECH = "speech, second"


class Judge(Protocol):
    """Tells what items of one modality show or say.

    Attributes:
        about: what it is, and what it was fitted on.
    """

    about: dict[str, Any]

    def judge(self, items: Sequence[Any], *, motions: bool) -> Concepts:
        """Return the digit, and if `motions` the motion, of each item in the raw form of its tokenizer."""
        ...


class JudgeOfText:
    """Reads which digit and which motion a text names."""

    def __init__(self) -> None:
        self.about = {"name": "the one digit, and the one motion, that the text names", "fitted_on": None}

    def judge(self, items: Sequence[str], *, motions: bool) -> Concepts:
        """Return what each text names."""
        named = [(digit_of_text(item), motion_of_text(item)) for item in items]
        digits = np.array([NO_ANSWER if digit is None else digit for digit, _ in named], dtype=np.int64)
        if not motions:
            return Concepts(digits, None)
        moves = [NO_ANSWER if motion is None else MOTIONS.index(motion) for _, motion in named]
        return Concepts(digits, np.array(moves, dtype=np.int64))


class JudgeOfImages:
    """A `DigitImageJudge` fitted on all train pictures, altered copies among them, as the model's tokenizer reads them.

    A picture says no motion: all motions that are asked for are NO_ANSWER.
    """

    def __init__(self, world: World) -> None:
        places = world.places("train", None)
        pictures = pixels(world.read("train", "image", places))
        digits = world.concepts("train", places, motions=False).digits
        self._judge = DigitImageJudge.fit(pictures, digits)
        self.about = {
            "name": "support vector machine on the pixels",
            "fitted_on": f"train: {len(places)} pictures, altered copies among them",
        }

    def judge(self, items: Sequence[Float[Tensor, "C H W"]], *, motions: bool) -> Concepts:
        """Return the digit that each picture shows best."""
        return Concepts(self._judge.predict(pixels(items)), np.full(len(items), NO_ANSWER) if motions else None)


class JudgeOfSpeech:
    """Hears words, or phrases where a motion is asked for, with a judge that was trained by somebody else.

    Args:
        rate: of the items, in Hz.

    Raises:
        OmniformError: another rate than that of the judges.
    """

    def __init__(self, judge: SpeechJudge | WhisperJudge, rate: int) -> None:
        if rate != SAMPLE_RATE:
            raise OmniformError(
                f"the model's speech tokenizer has {rate} Hz, but judges of speech hear {SAMPLE_RATE}: choose that "
                "sample_rate for the tokenizer"
            )
        self._judge = judge
        names = {
            SpeechJudge: "pocketsphinx with a grammar of ten words, or of fifty phrases",
            WhisperJudge: "Whisper tiny.en",
        }
        self.about = {"name": names[type(judge)], "fitted_on": None}

    def judge(self, items: Sequence[Float[Tensor, "N"]], *, motions: bool) -> Concepts:
        """Return what each item says."""
        return Concepts(*self._judge.predict_phrases(items)) if motions else Concepts(self._judge.predict(items), None)


class JudgeOfVideos:
    """A `VideoJudge` fitted on the original train pictures."""

    def __init__(self, world: World) -> None:
        every = world.places("train", None)
        places = tuple(place for place in every if not world.metadata("train", place).get("copy"))
        pictures = [
            np.asarray(read_picture(payload, "L")) / 127.5 - 1 for payload in world.payloads("train", "image", places)
        ]
        digits = world.concepts("train", places, motions=False).digits
        self._judge = VideoJudge.fit(at_judged_size(np.stack(pictures)), digits)
        self.about = {
            "name": "support vector machine on the frames, about their ink; slope of the path of the ink",
            "fitted_on": f"train: {len(places)} original pictures, no video",
        }

    def judge(self, items: Sequence[Float[Tensor, "C T H W"]], *, motions: bool) -> Concepts:
        """Return the digit, and how it moves."""
        digits, moves = self._judge.predict(items)
        return Concepts(digits, moves if motions else None)


class Judges:
    """The judge of each modality, made when it is first asked for: on the train split, or on nothing of the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._made: dict[str, Judge] = {}

    def __getitem__(self, name: str) -> Judge:
        """Return the judge of a modality, or SECOND_OF_SPEECH, which is Whisper.

        Raises:
            OmniformError: what it needs is not installed, or cannot judge what the model's tokenizers make.
        """
        if name not in self._made:
            make: dict[str, Callable[[], Judge]] = {
                "text": JudgeOfText,
                "image": lambda: JudgeOfImages(self._world),
                "speech": lambda: JudgeOfSpeech(SpeechJudge(), self._rate),
                "video": lambda: JudgeOfVideos(self._world),
                SECOND_OF_SPEECH: lambda: JudgeOfSpeech(WhisperJudge(), self._rate),
            }
            self._made[name] = make[name]()
        return self._made[name]

    @property
    def about(self) -> dict[str, dict[str, Any]]:
        """What the judges are that were asked for."""
        return {name: judge.about for name, judge in sorted(self._made.items())}

    @property
    def _rate(self) -> int:
        tokenizer: Any = self._world.tokenizers["speech"]
        return int(tokenizer.config.sample_rate)


def pixels(images: Sequence[Float[Tensor, "C H W"]]) -> Float[np.ndarray, "N 16 16"]:
    """Return gray pictures in [-1, 1], as judges see them."""
    return at_judged_size(np.stack([image.numpy().mean(axis=0) for image in images]))
