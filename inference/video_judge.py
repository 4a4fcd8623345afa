"""The judge of video: which digit moves, and which way. Fitted on real train pictures, never on video."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int
from torch import Tensor

from omniform.errors import OmniformError
from omniform.inference.judges import JUDGED_SIZE, MOTIONS, NO_ANSWER, DigitImageJudge

INK = 0.3  # of the way from paper to full ink: what is fainter, such as a codec's haze, has no weight
LEAST_INK = 2.0  # pixels of full ink that make a frame show something
STILL_BELOW = 0.5  # pixels per frame: half the speed of the slowest moving digit


@dataclass(frozen=True)
class VideoJudge:
    """Which digit a video shows and how it moves; bright ink on dark paper, one digit of JUDGED_SIZE pixels at most.

    The digit is the majority of an image judge over the frames, each cut to the square of JUDGED_SIZE pixels about its
    centroid of ink; of tied digits the one that is seen first. The motion is a closed form of the path of the centroid:
    the slope of the least-squares line through it, in pixels per frame. Slower than STILL_BELOW along both axes is
    still, else the faster axis and its sign say the direction. Frames of less than LEAST_INK have no say.
    """

    digits: DigitImageJudge

    @classmethod
    def fit(cls, images: Float[np.ndarray, "N H W"], labels: Int[np.ndarray, "N"]) -> Self:
        """Learn from real train pictures in [-1, 1], of JUDGED_SIZE pixels, and the digits that they show.

        The judge sees them as it will see frames: about their centroids.

        Raises:
            OmniformError: scikit-learn is not installed, or a picture without ink.
        """
        centred = []
        for place, image in enumerate(np.asarray(images, dtype=np.float64)):
            if (centroid := _centroid(image)) is None:
                raise OmniformError(f"picture {place} shows no ink: expected bright digits on dark paper")
            centred.append(_cut(image, centroid))
        return cls(DigitImageJudge.fit(np.stack(centred), labels))

    def predict(self, items: Sequence[Float[Tensor, "C T H W"]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the digit, and the place in MOTIONS of the motion, of each video in [-1, 1].

        NO_ANSWER for both where no frame has ink, and for the motion where only one has: a single frame of several does
        not move, and a video of one frame is still.

        Raises:
            OmniformError: an item is not (C, T, H, W).
        """
        digits, motions = [], []
        for item in items:
            video = np.asarray(item, dtype=np.float64)
            if video.ndim != 4:
                raise OmniformError(f"a video is {video.shape}, expected (C, T, H, W)")
            frames = video.mean(axis=0)
            path = {time: place for time, frame in enumerate(frames) if (place := _centroid(frame)) is not None}
            digits.append(self._digit([_cut(frames[time], place) for time, place in path.items()]))
            motions.append(_motion(path, len(frames)))
        return np.array(digits, dtype=np.int64), np.array(motions, dtype=np.int64)

    def _digit(self, cuts: Sequence[Float[np.ndarray, "16 16"]]) -> int:
        if not cuts:
            return NO_ANSWER
        return int(Counter(self.digits.predict(np.stack(cuts)).tolist()).most_common(1)[0][0])


def gaps(
    videos: Sequence[Float[Tensor, "C T H W"]], following: Sequence[Float[Tensor, "C T H W"]]
) -> Float[np.ndarray, "N M"]:
    """Return the pixels between the ink of the last frame of each video and that of the first frame of each other one;
    infinite where one of these frames has none."""
    ends, starts = _ink_at([video[:, -1] for video in videos]), _ink_at([video[:, 0] for video in following])
    return np.nan_to_num(np.linalg.norm(ends[:, None] - starts, axis=-1), nan=np.inf)


def _ink_at(frames: Sequence[Float[Tensor, "C H W"]]) -> Float[np.ndarray, "N 2"]:
    """Return the centroid of each frame, NaN where it has none."""
    found = [_centroid(np.asarray(frame, dtype=np.float64).mean(axis=0)) for frame in frames]
    return np.array([(math.nan, math.nan) if place is None else place for place in found]).reshape(-1, 2)


def _motion(path: dict[int, Float[np.ndarray, "2"]], n_frames: int) -> int:
    if len(path) < min(2, n_frames) or not path:
        return NO_ANSWER
    if len(path) == 1:
        return MOTIONS.index("still")
    times = np.array(list(path), dtype=np.float64) - np.mean(list(path))
    down, right = times @ np.stack(list(path.values())) / (times @ times)
    if max(abs(down), abs(right)) < STILL_BELOW:
        return MOTIONS.index("still")
    if abs(right) >= abs(down):
        return MOTIONS.index("right" if right > 0 else "left")
    return MOTIONS.index("down" if down > 0 else "up")


def _centroid(frame: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "2"] | None:
    """Return the (row, column) about which the ink lies, or None where there is too little of it."""
    ink = ((frame + 1) / 2 - INK).clip(0) / (1 - INK)
    if ink.sum() < LEAST_INK:
        return None
    rows, columns = np.indices(frame.shape)
    return np.array([(ink * rows).sum(), (ink * columns).sum()]) / ink.sum()


def _cut(frame: Float[np.ndarray, "H W"], centroid: Float[np.ndarray, "2"]) -> Float[np.ndarray, "16 16"]:
    """Return the square whose centre is nearest to the centroid; beyond the frame lies paper."""
    reach = JUDGED_SIZE // 2
    padded = np.pad(frame, reach, constant_values=-1)
    top, left = np.floor(centroid + 1).astype(int)  # the centre of 16 pixels lies between two of them
    return padded[top : top + JUDGED_SIZE, left : left + JUDGED_SIZE]
