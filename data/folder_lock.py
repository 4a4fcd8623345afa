"""A folder that one process at a time works in."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omniform.data.schema import DataError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other processes out of it until the block ends: they wait.

    Raises:
        DataError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends, however that comes
        yield
