"""What the any-to-any suite prompts with: the held-out items of each cell, and what they show and say."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from omniform.data.moving_digits import HELD_OUT_PAIRS
from omniform.data.schema import RawSample
from omniform.data.shards import ShardReader
from omniform.errors import OmniformError
from omniform.inference.judges import MOTIONS, NO_ANSWER
from omniform.tokenizers.base import Modality

MODALITIES = ("text", "image", "speech", "video")
CELLS = tuple(f"{source}->{target}" for source in MODALITIES for target in MODALITIES)
# After the name of the split; all other cells take "-concepts".
_FOLDERS = {
    "text->text": "-text",
    "text->image": "",
    "image->text": "",
    "video->video": "-continued",
    **dict.fromkeys(("text->video", "video->text", "speech->video", "video->speech"), "-moving-concepts"),
}


@dataclass(frozen=True)
class Concepts:
    """What items show or say, or are judged to.

    Attributes:
        digits: 0 to 9, or NO_ANSWER.
        motions: places in MOTIONS, or NO_ANSWER; None where nobody asks for a motion.
    """

    digits: Int[np.ndarray, "N"]
    motions: Int[np.ndarray, "N"] | None

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, places: npt.NDArray[Any]) -> "Concepts":
        return Concepts(self.digits[places], None if self.motions is None else self.motions[places])

    def agree(self, other: "Concepts") -> Bool[np.ndarray, "N"]:
        """Return where both have the same digit and, if motions are asked for, the same motion."""
        same = self.digits == other.digits
        return same if self.motions is None or other.motions is None else same & (self.motions == other.motions)

    def tell(self, place: int) -> dict[str, int | str | None]:
        """Return one as JSON, None where there is none."""
        digit = int(self.digits[place])
        motion = NO_ANSWER if self.motions is None else int(self.motions[place])
        return {
            "digit": None if digit == NO_ANSWER else digit,
            "motion": None if motion == NO_ANSWER else MOTIONS[motion],
        }


@dataclass(frozen=True)
class CellItems:
    """The items of one cell.

    Attributes:
        sources: to prompt with, in the raw form of their tokenizer.
        targets: real items of the target modality that show or say the same; of image->image and
            speech->speech the sources themselves, of texts other wordings, of videos what follows them.
        concepts: what both sides of each item show or say.
        key: tells these targets from those of other cells.
    """

    sources: list[Any]
    targets: list[Any]
    concepts: Concepts
    key: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.concepts)


@dataclass(frozen=True)
class World:
    """A digits-world, read with the tokenizers of a model. What was read is kept.

    Attributes:
        split: the held-out one.
    """

    tokenizers: Mapping[str, Modality[Any]]
    folder: Path
    split: str
    _readers: dict[str, ShardReader] = field(default_factory=dict, repr=False)
    _samples: dict[tuple[str, int], RawSample] = field(default_factory=dict, repr=False)
    _items: dict[tuple[str, int, str, int], Any] = field(default_factory=dict, repr=False)

    def why_not(self, cell: str) -> str | None:
        """Return why a cell cannot be scored, or None where it can."""
        missing = [name for name in dict.fromkeys(cell.split("->")) if name not in self.tokenizers]
        if missing:
            return f"the model has no {' and no '.join(missing)}"
        folder = self.split + _FOLDERS.get(cell, "-concepts")
        return None if (self.folder / folder).is_dir() else f"the world has no {folder}"

    def cell(self, cell: str, limit: int | None) -> CellItems:
        """Return the items of a cell, at most `limit` of them, in the order of `places`.

        "text->image" and back are of the folder SPLIT, "text->text" of SPLIT-text, "video->video" of SPLIT-continued.
        Text or speech on one side and video on the other can both say a motion: those are of SPLIT-moving-concepts.
        All others are of SPLIT-concepts, and say a digit alone.

        Raises:
            OmniformError: a sample says no digit, or no motion where one is asked for.
        """
        source, _, target = cell.partition("->")
        suffix = _FOLDERS.get(cell, "-concepts")
        folder = self.split + suffix
        places = self.places(folder, limit)
        ordinal = 1 if cell in ("text->text", "video->video") else 0
        concepts = self.concepts(folder, places, motions=suffix in ("-continued", "-moving-concepts"))
        return CellItems(
            self.read(folder, source, places),
            self.read(folder, target, places, ordinal),
            concepts,
            (folder, target, ordinal, places),
        )

    def places(self, folder: str, limit: int | None) -> tuple[int, ...]:
        """Return the places of at most `limit` samples of a folder; digits take turns, and so do the motions of each.

        The first few hold as many of one digit as of any other, while there are any.
        """
        places_of: dict[Any, dict[Any, list[int]]] = {}
        for place in range(len(self._reader(folder))):
            about = self.metadata(folder, place)
            places_of.setdefault(about.get("digit"), {}).setdefault(about.get("motion"), []).append(place)
        by_digit = []
        for turn, of_motions in enumerate(places_of.values()):
            motions = sorted(of_motions, key=str)
            first = turn % len(motions)  # or each round over the digits would show one motion alone
            by_digit.append(_in_turns([of_motions[motion] for motion in motions[first:] + motions[:first]]))
        return tuple(_in_turns(by_digit)[:limit])

    def read(self, folder: str, modality: str, places: tuple[int, ...], ordinal: int = 0) -> list[Any]:
        """Return items in the raw form of their tokenizer: of each sample the first of its modality, or the
        `ordinal`-th after it."""
        for place in places:
            if (folder, place, modality, ordinal) not in self._items:
                self._items[folder, place, modality, ordinal] = self.item(folder, place, modality, ordinal)
        return [self._items[folder, place, modality, ordinal] for place in places]

    def payloads(self, folder: str, modality: str, places: tuple[int, ...]) -> list[bytes]:
        """Return the files of the first items of a modality, as they are stored."""
        samples = (self._sample(folder, place) for place in places)
        return [next(span.payload or b"" for span in s.spans if span.modality == modality) for s in samples]

    def concepts(self, folder: str, places: tuple[int, ...], *, motions: bool) -> Concepts:
        """Return what samples say of themselves."""
        about = [(self._sample(folder, place).key, self.metadata(folder, place)) for place in places]
        for key, metadata in about:
            for name in ("digit", "motion")[: 1 + motions]:
                if name not in metadata:
                    raise OmniformError(
                        f"{self.folder / folder}: sample {key} says no {name} to score by: expected a digits-world"
                    )
        digits = np.array([metadata["digit"] for _, metadata in about], dtype=np.int64)
        if not motions:
            return Concepts(digits, None)
        return Concepts(digits, np.array([MOTIONS.index(metadata["motion"]) for _, metadata in about], dtype=np.int64))

    def metadata(self, folder: str, place: int) -> Mapping[str, Any]:
        """Return what a sample says of itself."""
        return self._sample(folder, place).metadata

    def held_out_pairs(self, concepts: Concepts) -> Bool[np.ndarray, "N"]:
        """Return which items have a digit and a motion that training never shows together."""
        if concepts.motions is None:
            return np.zeros(len(concepts), dtype=bool)
        pairs = {(digit, MOTIONS.index(motion)) for digit, motion in HELD_OUT_PAIRS[self.split]}
        found = zip(concepts.digits.tolist(), concepts.motions.tolist(), strict=True)
        return np.array([pair in pairs for pair in found], dtype=bool)

    def _reader(self, folder: str) -> ShardReader:
        if folder not in self._readers:
            self._readers[folder] = ShardReader(self.folder / folder)
        return self._readers[folder]

    def _sample(self, folder: str, place: int) -> RawSample:
        if (folder, place) not in self._samples:
            self._samples[folder, place] = self._reader(folder)[place]
        return self._samples[folder, place]

    def item(self, folder: str, place: int, modality: str, ordinal: int) -> Any:
        """Return one item as `read` does, without keeping it."""
        sample = self._sample(folder, place)
        spans = [span for span in sample.spans if span.modality == modality]
        if len(spans) <= ordinal:
            raise OmniformError(
                f"{self.folder / folder}: sample {sample.key} has {len(spans)} spans of {modality}, expected "
                f"{ordinal + 1}: this is no digits-world"
            )
        span = spans[ordinal]
        return span.text if span.payload is None else self.tokenizers[modality].read(span.payload)


def _in_turns(groups: Iterable[Sequence[int]]) -> list[int]:
    """Return the first of each group, then the second of each, and so on."""
    return [place for turn in itertools.zip_longest(*groups) for place in turn if place is not None]
