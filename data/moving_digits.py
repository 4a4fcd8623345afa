"""Moving digits: a drawing that stands or moves on a black field, and which digits move how in which split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8

from omniform.data.handwritten_digits import IMAGE_SIZE
from omniform.data.templates import MOTIONS
from omniform.kernels.keyed_noise import keyed_bits, stream

FIELD_SIZE, N_FRAMES, FPS = 32, 9, 8
# Pixels between the places along its way where a drawing can start; across, it keeps to the middle. Codes of a clip
# stand for squares of this size: a drawing that lies on their edges anyhow looks different to them at every place.
START_STEP = 8
# Pixels per frame: over a clip, a drawing goes one or two such steps.
SPEEDS = (1, 2)
# Right and down, in units of the speed.
DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Seen by one split alone. Those of test ask for a digit and a motion that were learnt, but never together; those of
# validation ask the same where choices are made.
HELD_OUT_PAIRS = {
    "validation": tuple((digit, MOTIONS[(digit + 1) % 5]) for digit in range(5, 10)),
    "test": tuple((digit, MOTIONS[digit]) for digit in range(5)),
}


@dataclass(frozen=True)
class Clip:
    """A drawing and its way across the field.

    Attributes:
        row, copy: which drawing; see `altered`.
        speed: pixels per frame, 0 for one that stands.
        start: pixels from the left and upper edge to the drawing's, in the first frame.
    """

    digit: int
    motion: str
    row: int
    copy: int
    speed: int
    start: tuple[int, int]

    def metadata(self) -> dict[str, Any]:
        """Return what a sample says of it."""
        return {**vars(self), "start": list(self.start)}


def pairs_of(split: str) -> list[tuple[int, str]]:
    """Return the digits and motions that a split shows: all but those held out for another."""
    elsewhere = {pair for other, pairs in HELD_OUT_PAIRS.items() if other != split for pair in pairs}
    return [pair for digit in range(10) for motion in MOTIONS if (pair := (digit, motion)) not in elsewhere]


def plan_clips(
    rows: Sequence[Sequence[int]], split: str, seed: int, copies: int, count: int, *, in_a_row: int = 1
) -> list[Clip]:
    """Return `count` clips of each digit and motion of a split; drawings, speeds and starts are drawn anew for each.

    Args:
        rows: of the split, that show each digit.
        copies: of each drawing that there are; 1 where none is altered.
        in_a_row: how many clips, each going on where the one before has ended, the field has room for.
    """
    clips = []
    room, steps = FIELD_SIZE - IMAGE_SIZE, (N_FRAMES - 1) * in_a_row
    speeds = [speed for speed in SPEEDS if speed * steps <= room]
    for digit, motion in pairs_of(split):
        for number in range(count):
            key = (seed, stream("digits/clip"), stream(split), digit, MOTIONS.index(motion), number, in_a_row)
            row, copy, speed, *start = keyed_bits(*key, np.arange(5)).tolist()
            pixels = 0 if motion == "still" else speeds[speed % len(speeds)]
            travel = [pixels * steps * step for step in DIRECTIONS[motion]]
            # The drawing stays on the field: its start leaves room for the way it goes.
            x, y = (
                max(-way, 0) + START_STEP * (place % ((room - abs(way)) // START_STEP + 1)) if way else room // 2
                for way, place in zip(travel, start, strict=True)
            )
            clips.append(Clip(digit, motion, rows[digit][row % len(rows[digit])], copy % copies, pixels, (x, y)))
    return clips


def following(clip: Clip) -> Clip:
    """Return the clip that begins with the last frame of this one and goes on as it did."""
    right, down = (clip.speed * (N_FRAMES - 1) * step for step in DIRECTIONS[clip.motion])
    return replace(clip, start=(clip.start[0] + right, clip.start[1] + down))


def draw_clip(drawing: UInt8[np.ndarray, "16 16"], clip: Clip) -> UInt8[np.ndarray, "9 32 32 1"]:
    """Return the frames of a clip."""
    frames = np.zeros((N_FRAMES, FIELD_SIZE, FIELD_SIZE, 1), np.uint8)
    right, down = DIRECTIONS[clip.motion]
    for time, frame in enumerate(frames):
        x, y = clip.start[0] + time * clip.speed * right, clip.start[1] + time * clip.speed * down
        frame[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE, 0] = drawing
    return frames
