"""The files of a folder that somebody else filled: walked in a fixed order, and never left through a link."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from omniform.data.schema import DataError


class FileError(DataError):
    """One file of a folder that is not read, with the reason by which such files are counted."""

    def __init__(self, reason: str, name: str, detail: str = "") -> None:
        super().__init__(f"{name}: {reason}{detail and f' ({detail})'}")
        self.reason = reason


class FolderTree:
    """The plain files below a folder, by their paths relative to it with / between parts.

    Hidden names (which begin with a dot) are passed over and counted. A link to a file is followed as long as the file
    lies in the same folder; a link to a folder is not.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder: give the folder that holds the images")
        self.root = root.resolve()
        self.n_hidden = 0

    def walk(self) -> Iterator[tuple[str, FileError | None]]:
        """Yield (path, None) for each file, or (path, why not) for what cannot be entered: the files of a folder in the
        order of their names, then its folders one by one. Holds the names of one folder at a time in memory, and those
        of the folders beside and above it.
        """
        pending = [""]
        while pending:
            folder = pending.pop()
            try:
                entries = sorted(os.scandir(self.root / folder), key=lambda entry: entry.name)
            except OSError as error:
                yield folder, FileError("folder cannot be read", folder, error.strerror or "")
                continue
            inner = []
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    self.n_hidden += 1
                elif entry.is_dir(follow_symlinks=False):
                    inner.append(path)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    yield path, FileError("link to a folder", path)
                else:
                    yield path, None
            pending += reversed(inner)

    def check(self, path: str) -> Path:
        """Return where a path leads.

        Raises:
            FileError: out of the folder, or nowhere.
        """
        try:
            resolved = (self.root / path).resolve(strict=True)
        except (OSError, RuntimeError) as error:  # a loop of links, on some versions of Python a RuntimeError
            raise FileError("cannot be read", path, str(getattr(error, "strerror", None) or error)) from error
        if not resolved.is_relative_to(self.root):
            raise FileError("link out of the folder", path)
        return resolved

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return the content of a file.

        Raises:
            FileError: it lies outside of the folder, is no plain file, is larger than `max_bytes`, or cannot be read.
        """
        resolved = self.check(path)
        try:
            # What was a file a moment ago may be a link or a pipe by now: follow no more links, wait for no writer.
            descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise FileError("not a plain file", path)
                if status.st_size > max_bytes:
                    raise FileError("file too large", path, f"{status.st_size} bytes, expected at most {max_bytes}")
                return file.read(status.st_size)
        except OSError as error:
            raise FileError("cannot be read", path, error.strerror or "") from error
