"""Scenes of digits-world: pictures of two digits and the place of one of them, and places at which to draw one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from jaxtyping import UInt8

from omniform.data.handwritten_digits import IMAGE_SIZE, altered, png_bytes, rows_by_digit
from omniform.data.schema import RawSample, RawSpan
from omniform.data.templates import SCENES, render
from omniform.kernels.keyed_noise import keyed_bits, stream
from omniform.tokenizers.locations import Location, locations_as_json

SCENE_SIZE = 32
# Pixels between neighbouring places of a drawing: where one stands is then a matter of whole codes of an image.
PLACE_STEP = 8
# Of each asked digit.
SCENES_PER_DIGIT = {"train": 200, "validation": 20, "test": 20}
SceneKind = Literal["find", "draw"]
KINDS: tuple[SceneKind, ...] = get_args(SceneKind)

_STEPS = range(0, SCENE_SIZE - IMAGE_SIZE + 1, PLACE_STEP)
PLACES = tuple((x, y) for y in _STEPS for x in _STEPS)
# Where two drawings can stand that do not overlap.
PAIRS_OF_PLACES = tuple(
    (one, other)
    for one in PLACES
    for other in PLACES
    if max(abs(one[0] - other[0]), abs(one[1] - other[1])) >= IMAGE_SIZE
)


@dataclass(frozen=True)
class PlacedDigit:
    """A drawing in a scene.

    Attributes:
        row, copy: which drawing; see `altered`.
        place: pixels from the left and upper edge of the scene to the drawing's.
    """

    digit: int
    row: int
    copy: int
    place: tuple[int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of the drawing, in pixels of the scene."""
        x, y = self.place
        return x, y, x + IMAGE_SIZE, y + IMAGE_SIZE

    def metadata(self) -> dict[str, Any]:
        """Return what a sample says of it."""
        return {"digit": self.digit, "row": self.row, "copy": self.copy, "box": list(self.box)}


def scene_samples(
    kind: SceneKind,
    images: UInt8[np.ndarray, "R 16 16"],
    labels: npt.NDArray[np.int64],
    split: str,
    seed: int,
    copies: int,
    limit: int | None = None,
) -> Iterator[RawSample]:
    """Yield the scenes of a kind and split, which are a pure function of the arguments.

        find   image of two digits, text that asks where one of them is, location: the box of its drawing
        draw   text that asks for a digit, location: a box, image of that digit in that box and of nothing else

    Metadata says of both "template", and "digit", "row", "copy" and "box" (pixels) of the digit asked for; of
    "find" also "other": the same of the digit not asked for.

    Args:
        copies: of each drawing of this split that there are; see `altered`.
        limit: at most so many of each digit.
    """
    rows = rows_by_digit(labels, split)
    count = SCENES_PER_DIGIT[split] if limit is None else min(SCENES_PER_DIGIT[split], limit)
    templates = SCENES[kind][split == "test"]
    for digit in range(10):
        for number in range(count):
            key = (seed, stream("digits/scene"), stream(split), stream(kind), digit, number)
            bits = [int(word) for word in keyed_bits(*key, np.arange(7))]
            one, other = PAIRS_OF_PLACES[bits[0] % len(PAIRS_OF_PLACES)]
            asked = _drawn(rows, digit, bits[1:3], copies, one)
            template = templates[bits[3] % len(templates)]
            metadata = {"template": template, **asked.metadata()}
            shown = [asked]
            if kind == "find":
                second = (digit + 1 + bits[4] % 9) % 10
                shown.append(_drawn(rows, second, bits[5:7], copies, other))
                metadata["other"] = shown[1].metadata()
            picture = draw_scene([altered(images, d.row, d.copy, seed)[0] for d in shown], shown)
            image = RawSpan("image", payload=png_bytes(picture), extension="png")
            text = RawSpan("text", text=render(template, digit))
            box = Location.box(*(edge / SCENE_SIZE for edge in asked.box))
            location = RawSpan("location", payload=locations_as_json([box]).encode(), extension="json")
            spans = (image, text, location) if kind == "find" else (text, location, image)
            yield RawSample(f"{digit}-{number:03d}", spans, metadata)


def draw_scene(
    drawings: Sequence[UInt8[np.ndarray, "16 16"]], placed: Sequence[PlacedDigit]
) -> UInt8[np.ndarray, "32 32"]:
    """Return a black picture with each drawing at its place."""
    picture = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
    for drawing, digit in zip(drawings, placed, strict=True):
        x, y = digit.place
        picture[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] = drawing
    return picture


def _drawn(
    rows: Sequence[Sequence[int]], digit: int, bits: Sequence[int], copies: int, place: tuple[int, int]
) -> PlacedDigit:
    row = rows[digit][bits[0] % len(rows[digit])]
    return PlacedDigit(digit, row, bits[1] % copies, place)
