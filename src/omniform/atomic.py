"""Files that are there whole or not at all. A leaf: every room may import it."""

import os
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that no one ever finds a part of it, also after a crash.

    The file beside it is new and named by the process, so it is no one's file, and several processes can write to one
    path: the last to end has written it. A link at `path` is replaced, and what it points to stays as it is.

    Raises:
        OSError: the folder is not there, or cannot be written to.
    """
    # A process that was killed may have left a file, and the next one may have its id.
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
