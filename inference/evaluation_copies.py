"""Copies among what a model generates: how items of each modality are compared with what training showed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from omniform.inference.copies import CopyDetector
from omniform.inference.evaluation_items import World
from omniform.inference.evaluation_judging import pixels
from omniform.inference.judges import at_judged_size
from omniform.inference.reconstruction.sounds import FLOOR_DB, MEL_HOP, mel_levels
from omniform.inference.speech_judge import SAMPLE_RATE

# What training showed of each modality: its folder, and how many items of it, spread evenly, are compared with. All
# pictures are; of the others a part, since each must be read and go through its tokenizer.
_TRAIN: dict[str, tuple[str, int | None]] = {
    "image": ("train", None),
    "speech": ("train-speech", 200),
    "phrase": ("train-moving-concepts", 200),
    "video": ("train-video", 600),
    "continued": ("train-continued", 600),
}
_SECONDS = 2.0  # of a sound that are compared
_QUIETEST_DB = -100.0  # a sound in which nothing is louder is silence
_AT_ONCE = 256


class Copies:
    """Finds copies of train items among pictures, sounds and videos.

    Each is compared as its tokenizer gives it back: pictures by their pixels at the judge's size; videos by the pixels
    of all frames at that size; sounds by the levels of their mel bands in dB over the first _SECONDS, relative to the
    loudest and held above FLOOR_DB, silence after their end. What a copy is: see `CopyDetector`. Where a part of the
    train items is compared with, copies of others are missed, and their rate means something only beside that of real
    held-out items, which are compared with the same part.

    Args:
        kind: a key of _TRAIN: "phrase" is speech that says a motion, "continued" a video that goes on from another.
    """

    def __init__(self, world: World, kind: str) -> None:
        folder, limit = _TRAIN[kind]
        self.modality = {"phrase": "speech", "continued": "video"}.get(kind, kind)
        self._tokenizer = world.tokenizers[self.modality]
        places = world.places(folder, limit)
        train = self.features(self.round_trip(world.read(folder, self.modality, places, int(kind == "continued"))))
        originals = np.array([not world.metadata(folder, place).get("copy") for place in places])
        self._detector = CopyDetector.fit(train, train[originals] if kind == "image" else None)
        self.about = {"compared_with": folder, "n": len(places), "of": len(world.places(folder, None))}

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
        """Return what items are compared by."""
        measure: dict[str, Callable[[Sequence[Any]], Float[np.ndarray, N * S]]] = {
            "image": pixels,
            "speech": _levels,
            "video": _frames,
        }
        return measure[self.modality](items).reshape(len(items), -1)


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
