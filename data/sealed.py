"""Sealed JSON: a JSON file that carries its own digest and has exactly one valid form, so that any changed bit shows.

Lists at the top level are written one entry per line, so that a person can read them and a difference names its entry.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from omniform.atomic import write_whole
from omniform.data.schema import DataError


def seal(content: dict[str, Any]) -> bytes:
    """Return the file's bytes: the content in one fixed layout, and the sha256 of that as the last key."""
    digest = hashlib.sha256(_layout(content)).hexdigest()
    return _layout({**content, "sha256": digest})


def unseal(path: Path, remedy: str) -> dict[str, Any]:
    """Read a sealed file and return its content without the digest.

    Args:
        remedy: what to do about a damaged file; ends the error's message.

    Raises:
        DataError: the file is missing, or any bit of it changed since it was sealed.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    try:
        content = json.loads(stored)
        content.pop("sha256")
        intact = seal(content) == stored
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DataError(f"{path} is damaged: its content does not match its own sha256: {remedy}")
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all; the folder that it is in is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def _layout(content: dict[str, Any]) -> bytes:
    entries = []
    for key, value in content.items():
        if isinstance(value, list) and value:
            body = "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]"
        else:
            body = json.dumps(value, ensure_ascii=False)
        entries.append(f"{json.dumps(key, ensure_ascii=False)}: {body}")
    return ("{\n" + ",\n".join(entries) + "\n}\n").encode()
