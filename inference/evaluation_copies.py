"""Copies among what a model generates: how items of each modality are compared with what training showed."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from omniform.inference.copies import N_MEASURED, CopyDetector
from omniform.inference.evaluation_items import World
from omniform.inference.evaluation_judging import pixels
from omniform.inference.judges import at_judged_size
from omniform.inference.reconstruction.sounds import FLOOR_DB, MEL_HOP, mel_levels
from omniform.inference.speech_judge import SAMPLE_RATE

# What training showed of each modality.
_TRAIN = {
    "image": "train",
    "speech": "train-speech",
    "phrase": "train-moving-concepts",
    "video": "train-video",
    "continued": "train-continued",
}
_SECONDS = 2.0  # of a sound that are compared
_QUIETEST_DB = -100.0  # a sound in which nothing is louder is silence
_AT_ONCE = 256
_N_DECODED = 400  # items that all go through their tokenizer; of more, but pictures, those alone that are near


class Copies:
    """Finds copies of train items among pictures, sounds and videos.

    Each is compared as its tokenizer gives it back: pictures by their pixels at the judge's size; videos by the pixels
    of all frames at that size; sounds by the levels of their mel bands in dB over the first _SECONDS, relative to the
    loudest and held above FLOOR_DB, silence after their end. What a copy is: see `CopyDetector`. Which train items are
    nearest is looked for among all of them; where there are more than _N_DECODED, of sounds and videos among those as
    they are, so a tokenizer that changes much hides some: `rate_of_train` says how many it does not.

    Args:
        kind: a key of _TRAIN: "phrase" is speech that says a motion, "continued" a video that goes on from another.

    Attributes:
        rate_of_train: how many of N_MEASURED train items, given back by the tokenizer, are found to be copies: what a
            model that only recalls would score.
    """

    def __init__(self, world: World, kind: str) -> None:
        self.modality = {"phrase": "speech", "continued": "video"}.get(kind, kind)
        self._world, self._folder, self._ordinal = world, _TRAIN[kind], int(kind == "continued")
        self._tokenizer = world.tokenizers[self.modality]
        self._places = np.array(world.places(self._folder, None))
        self._decoded: dict[int, Float[np.ndarray, F]] = {}
        every = np.arange(len(self._places))
        all_decoded = kind == "image" or len(every) <= _N_DECODED
        read = self._round_trips if all_decoded else lambda rows: self.features(self._train(rows))
        train = np.concatenate([read(every[first : first + _AT_ONCE]) for first in every[::_AT_ONCE]])
        originals = every
        if kind == "image":  # of the others no altered one is as near as altered drawings are
            originals = every[[not world.metadata(self._folder, place).get("copy") for place in self._places.tolist()]]
        self._detector = CopyDetector.fit(train, self._round_trips, originals)
        self.rate_of_train = float(self._detector.find(self._round_trips(originals[:N_MEASURED])).mean())
        self.about = {"compared_with": self._folder, "n": len(every)}

    def find(self, items: Sequence[Any]) -> Bool[np.ndarray, "N"]:
        """Return which items, decoded by the tokenizer, are copies of train items."""
        return self._detector.find(self.features(items))

    def alike(self, items: Sequence[Any], sources: Sequence[Any]) -> Bool[np.ndarray, "N"]:
        """Return which items, decoded by the tokenizer, are copies of the real item at the same place."""
        return self._detector.alike(self.features(items), self.features(self.round_trip(sources)))

    def round_trip(self, items: Sequence[Any]) -> list[Any]:
        """Return real items as the tokenizer gives them back; sounds at their own length."""
        done: list[Any] = []
        with torch.inference_mode():
            for first in range(0, len(items), _AT_ONCE):
                done += self._tokenizer.decode_batch(self._tokenizer.encode_batch(items[first : first + _AT_ONCE]))
        return done

    def features(self, items: Sequence[Any]) -> Float[np.ndarray, "N F"]:
        """Return what items are compared by, in single precision."""
        measure: dict[str, Callable[[Sequence[Any]], Float[np.ndarray, N * S]]] = {
            "image": pixels,
            "speech": _levels,
            "video": _frames,
        }
        return measure[self.modality](items).reshape(len(items), -1).astype(np.float32)

    def _train(self, rows: npt.NDArray[np.int64]) -> list[Any]:
        """Return train items; they are not kept, for all of them would take long to read but more room to keep."""
        places = self._places[rows].tolist()
        return [self._world.item(self._folder, place, self.modality, self._ordinal) for place in places]

    def _round_trips(self, rows: npt.NDArray[np.int64]) -> Float[np.ndarray, "R F"]:
        new = np.array([row for row in rows.tolist() if row not in self._decoded], dtype=np.int64)
        if len(new):
            found = self.features(self.round_trip(self._train(new)))
            self._decoded.update(zip(new.tolist(), found, strict=True))
        return np.stack([self._decoded[row] for row in rows.tolist()])


def repeats(texts: Sequence[str], sources: Sequence[str]) -> Bool[np.ndarray, "N"]:
    """Return which texts have the words of the text at the same place, and no others, in its order."""
    return np.array([_words(text) == _words(source) for text, source in zip(texts, sources, strict=True)], dtype=bool)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _frames(videos: Sequence[Float[Tensor, "C T H W"]]) -> Float[np.ndarray, "N T 16 16"]:
    return np.stack([at_judged_size(video.numpy().mean(axis=0)) for video in videos])


def _levels(sounds: Sequence[Float[Tensor, "N"]]) -> Float[np.ndarray, "N T M"]:
    n_frames = round(_SECONDS * SAMPLE_RATE / MEL_HOP)
    rows = []
    for sound in sounds:
        levels = mel_levels(sound.numpy(), SAMPLE_RATE)[:n_frames]
        levels = np.maximum(levels - max(levels.max(), _QUIETEST_DB), FLOOR_DB)
        rows.append(np.pad(levels, ((0, n_frames - len(levels)), (0, 0)), constant_values=FLOOR_DB))
    return np.stack(rows)
