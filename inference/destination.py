"""Where the command line puts the parts of replies."""

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from omniform.errors import OmniformError
from omniform.inference.part_files import default_suffix, formats
from omniform.inference.protocol import ContentPart, DataPart, SpeechPart, TextPart


@dataclass(frozen=True)
class Destination:
    """The files of all parts of a command.

    Attributes:
        stem: their path up to the suffix.
        suffix: the format of what it fits, all else has the default one of its modality; "" if none was asked for.
        takes_text: text and JSON go to files although the suffix does not ask for them.
    """

    stem: Path
    suffix: str
    takes_text: bool

    @classmethod
    def parse(cls, out: Path | None, seed: int) -> Self:
        """Turn what a user gives as `out` into a destination: a file, a name without suffix, or a folder that exists,
        for files named omniform-SEED; the current folder, without text, unless given.

        Raises:
            OmniformError: a file in a folder that does not exist.
        """
        if out is None:
            return cls(Path(f"omniform-{seed}"), "", takes_text=False)
        if out.is_dir():
            return cls(out / f"omniform-{seed}", "", takes_text=True)
        if not out.parent.is_dir():
            raise OmniformError(f"--out {out}: there is no folder {out.parent}; create it first")
        return cls(out.with_suffix(""), out.suffix, takes_text=not out.suffix)

    def check(self, modalities: Sequence[str]) -> None:
        """Check that the suffix fits one of the modalities that may be generated.

        Raises:
            OmniformError: it does not.
        """
        if self.suffix and not any(self._fits(name) for name in modalities):
            expected = ", or ".join(f"{' '.join(formats(name))} for {name}" for name in dict.fromkeys(modalities))
            raise OmniformError(f"--out {self.stem}{self.suffix}: {self.suffix} does not fit the reply, use {expected}")

    def paths(self, parts: Sequence[ContentPart]) -> list[Path | None]:
        """Return the file of each part, with numbers where several would have the same; None for text that is only
        printed, and for speech without a sample."""
        targets = [self._target(part) for part in parts]
        paths: list[Path | None] = []
        for place, (part, target) in enumerate(zip(parts, targets, strict=True)):
            if target is not None and targets.count(target) > 1:
                target = target.with_stem(f"{target.stem}-{targets[:place].count(target)}")
            silent = isinstance(part, SpeechPart) and not len(part.audio.samples)
            paths.append(None if silent else target)
        return paths

    def _target(self, part: ContentPart) -> Path | None:
        asked = self._fits(part.modality)
        if isinstance(part, TextPart | DataPart) and not (asked or self.takes_text):
            return None
        return self.stem.with_name(self.stem.name + (self.suffix if asked else default_suffix(part.modality)))

    def _fits(self, modality: str) -> bool:
        return self.suffix.lower() in formats(modality)


def reserve_file(folder: Path, suffix: str) -> Path:
    """Make an empty file, named by the next free number, and return its path, which no other process then takes.

    The folder is made if need be.

    Raises:
        OmniformError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            taken = {path.stem for path in folder.iterdir()}
            free = next(name for number in itertools.count(1) if (name := f"{number:03d}") not in taken)
            path = folder / f"{free}{suffix}"
            with suppress(FileExistsError):  # another one was faster
                path.touch(exist_ok=False)
                return path
    except OSError as error:
        raise OmniformError(f"cannot make a file in {folder}: {error.strerror}; choose --out-dir") from error
