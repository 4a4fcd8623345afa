"""Places in a picture <-> codes of their quantised coordinates.

    code:   0      1           2          3 ... n_bins + 2
            box    keypoint    polygon    coordinate 0 ... coordinate 1

    [box (0.25, 0, 0.75, 0.5), keypoint (1, 1)] in 33 bins:   0 11 3 27 19   1 35 35

Sources: Pix2Seq (arXiv:2109.10852) for coordinates as tokens of one codebook, rounded to the nearest of `n_bins` that
lie from one edge to the other; VisorGPT (arXiv:2305.13777) for boxes, keypoints and outlines in one sequence, each
under its kind. Deviations: x before y; no classes, which the text beside says; a code for each kind comes first, so
that a span needs no prompt template.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as config_dataclass

from omniform.tokenizers.base import Discrete, Modality, TokenizerError, Tokens
from omniform.tokenizers.folder import read_tokenizer_folder, write_tokenizer_folder

MAX_LOCATION_BYTES = 2**20
LocationKind = Literal["box", "keypoint", "polygon"]
KINDS: tuple[LocationKind, ...] = get_args(LocationKind)
_EXAMPLE = '[{"box": [0.25, 0, 0.75, 0.5]}, {"keypoint": [1, 1]}, {"polygon": [0, 0, 1, 0, 1, 1]}]'
# Of each kind; a polygon may have more.
_FEWEST_COORDINATES = {"box": 4, "keypoint": 2, "polygon": 6}


@dataclass(frozen=True)
class Location:
    """A place in a picture.

    Attributes:
        coordinates: x and y in turns, fractions of the picture's width and height, in [0, 1]. Of a box: left, upper,
            right, lower; of a polygon: its corners in order, at least three.

    Raises:
        TokenizerError: an unknown kind, another number of coordinates, one outside [0, 1], or a box whose right edge is
            left of its left one or whose lower edge is above its upper one.
    """

    kind: LocationKind
    coordinates: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TokenizerError(f"a location of kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        count, fewest = len(self.coordinates), _FEWEST_COORDINATES[self.kind]
        if count < fewest or count % 2 or (count > fewest and self.kind != "polygon"):
            expected = f"{fewest}{' or more, x and y of each corner' if self.kind == 'polygon' else ''}"
            raise TokenizerError(f"a {self.kind} of {count} coordinates, expected {expected}")
        for value in self.coordinates:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise TokenizerError(
                    f"a {self.kind} has the coordinate {value!r}, expected numbers in [0, 1]: divide pixels by the "
                    "picture's width and height"
                )
        if self.kind == "box" and (
            self.coordinates[0] > self.coordinates[2] or self.coordinates[1] > self.coordinates[3]
        ):
            raise TokenizerError(f"the box {list(self.coordinates)} ends before it begins, expected [x0, y0, x1, y1]")

    @classmethod
    def box(cls, left: float, upper: float, right: float, lower: float) -> Self:
        """Return a box."""
        return cls("box", (left, upper, right, lower))

    @classmethod
    def keypoint(cls, x: float, y: float) -> Self:
        """Return a keypoint."""
        return cls("keypoint", (x, y))

    @classmethod
    def polygon(cls, *coordinates: float) -> Self:
        """Return a polygon, of x and y of each corner."""
        return cls("polygon", coordinates)


def read_locations(payload: bytes) -> tuple[Location, ...]:
    """Read JSON: a list with an object of one key for each location, such as [{"box": [0.25, 0, 0.75, 0.5]}].

    Raises:
        TokenizerError: it is something else, or longer than MAX_LOCATION_BYTES.
    """
    if len(payload) > MAX_LOCATION_BYTES:
        raise TokenizerError(f"{len(payload)} bytes of locations, expected at most {MAX_LOCATION_BYTES}")
    try:
        entries = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{len(payload)} bytes of locations are not JSON: {error}") from error
    if not isinstance(entries, list):
        raise TokenizerError(f"locations are a {type(entries).__name__}, expected a list such as {_EXAMPLE}")
    found = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry.values())), list):
            raise TokenizerError(f"location {place} is {json.dumps(entry):.80}, expected an entry as in {_EXAMPLE}")
        ((kind, coordinates),) = entry.items()
        try:
            found.append(Location(kind, tuple(coordinates)))
        except TokenizerError as error:
            raise TokenizerError(f"location {place}: {error}") from error
    return tuple(found)


def locations_as_json(locations: Sequence[Location]) -> str:
    """Return the JSON that `read_locations` reads back without loss."""
    return json.dumps([{location.kind: location.coordinates} for location in locations])


@config_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LocationTokenizerConfig:
    """Sizes of a location tokenizer.

    Attributes:
        n_bins: values of a coordinate, evenly from 0 to 1. Where all coordinates are edges of pixels, one more than the
            picture has pixels per side loses nothing.
    """

    n_bins: int = Field(default=257, ge=2, le=2**16)


class LocationTokenizer(Modality):
    """A code that says what comes, and one for each coordinate. An item is a sequence of `Location`, in order.

    Coordinates come back within half of 1 / (n_bins - 1), and what came back once comes back as it is from then on.
    Every sequence of codes decodes, to what is whole in it: coordinates before the first kind are passed over, as are a
    location that lacks coordinates, those that one has too many, and the last of a polygon where it is odd; corners of
    a box are put in order.
    """

    kind = "locations"
    name = "location"
    fixed_grid = None

    def __init__(self, config: LocationTokenizerConfig) -> None:
        self.config = config
        self.representation = Discrete(len(KINDS) + config.n_bins)

    def encode_batch(self, items: Sequence[Any]) -> list[Tokens]:
        """Turn locations into codes.

        Raises:
            TokenizerError: an item is no sequence of locations.
        """
        return [self._encode(item) for item in items]

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[tuple[Location, ...]]:
        """Turn codes into locations.

        Raises:
            TokenizerError: a code that is not one of the tokenizer's.
        """
        return [self._decode(entry.codes.tolist()) for entry in tokens]

    def read(self, payload: bytes) -> tuple[Location, ...]:
        """Read JSON: see `read_locations`."""
        return read_locations(payload)

    def to_json(self, item: Sequence[Location]) -> str:
        """Return what `read` reads back without loss."""
        return locations_as_json(item)

    def save(self, folder: Path) -> None:
        """Write config.json and an empty payload: there are no weights."""
        plain = TypeAdapter(LocationTokenizerConfig).dump_python(self.config, mode="json")
        write_tokenizer_folder(folder, self.kind, plain, ("no-weights", b""))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        plain, _ = read_tokenizer_folder(folder, cls.kind)
        try:
            return cls(TypeAdapter(LocationTokenizerConfig).validate_python(plain))
        except ValidationError as error:
            raise TokenizerError(f"{folder}: its config does not describe locations: {error}") from error

    def _encode(self, item: object) -> Tokens:
        if not isinstance(item, list | tuple) or not all(isinstance(location, Location) for location in item):
            raise TokenizerError(f"locations are {item!r:.80}, expected a list of Location")
        codes: list[int] = []
        for location in item:
            codes.append(KINDS.index(location.kind))
            codes += [len(KINDS) + round(value * (self.config.n_bins - 1)) for value in location.coordinates]
        return Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),))

    def _decode(self, codes: Sequence[int]) -> tuple[Location, ...]:
        size = len(KINDS) + self.config.n_bins
        if codes and not (min(codes) >= 0 and max(codes) < size):
            raise TokenizerError(f"codes of locations span [{min(codes)}, {max(codes)}], expected [0, {size - 1}]")
        begins = [place for place, code in enumerate(codes) if code < len(KINDS)]
        runs = [codes[begin:end] for begin, end in itertools.pairwise([*begins, len(codes)])]
        return tuple(location for kind, *bins in runs if (location := self._location(KINDS[kind], bins)) is not None)

    def _location(self, kind: LocationKind, codes: Sequence[int]) -> Location | None:
        fewest = _FEWEST_COORDINATES[kind]
        if len(codes) < fewest:
            return None
        whole = len(codes) - len(codes) % 2 if kind == "polygon" else fewest
        values = [(code - len(KINDS)) / (self.config.n_bins - 1) for code in codes[:whole]]
        if kind == "box":
            (left, right), (upper, lower) = sorted(values[::2]), sorted(values[1::2])
            return Location.box(left, upper, right, lower)
        return Location(kind, tuple(values))
