"""The folder of one tokenizer: config.json and one payload file, checked as one by a digest.

config.json holds {"kind", "format_version", "config", "payload", "sha256"}. The digest covers the kind, the config and
the payload's bytes, so a changed bit anywhere is found. Nothing in it can run code.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omniform.tokenizers.base import TokenizerError

FORMAT_VERSION = 1
CONFIG = "config.json"


def write_tokenizer_folder(folder: Path, kind: str, config: Mapping[str, Any], payload: tuple[str, bytes]) -> None:
    """Write a tokenizer's folder; each file appears whole, the config last.

    Args:
        config: plain JSON.
        payload: file name and content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, content = payload
    record = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "config": dict(config),
        "payload": name,
        "sha256": _digest(kind, config, content),
    }
    _write(folder / name, content)
    _write(folder / CONFIG, (json.dumps(record, indent=2) + "\n").encode())


def read_kind(folder: Path) -> str:
    """Return the kind of the tokenizer in `folder`.

    Raises:
        TokenizerError: there is no readable config.json in it.
    """
    return str(_read_record(folder)["kind"])


def read_tokenizer_folder(folder: Path, kind: str) -> tuple[dict[str, Any], bytes]:
    """Return the config and the payload of a tokenizer's folder.

    Raises:
        TokenizerError: a file is missing or damaged, or the folder is of another kind or format.
    """
    record = _read_record(folder)
    if record["kind"] != kind or record["format_version"] != FORMAT_VERSION:
        raise TokenizerError(
            f"{folder / CONFIG} is a tokenizer of kind {record['kind']!r} in format {record['format_version']!r}, "
            f"expected kind {kind!r} in format {FORMAT_VERSION}"
        )
    name, config = record["payload"], record["config"]
    if not isinstance(config, dict) or not isinstance(name, str) or Path(name).name != name:
        raise TokenizerError(f"{folder / CONFIG} is damaged: expected an object `config` and a file name `payload`")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise TokenizerError(f"{folder / name} cannot be read: {error.strerror}; save the tokenizer again") from error
    if _digest(kind, config, content) != record["sha256"]:
        raise TokenizerError(
            f"{folder} is damaged: the sha256 over its config and {name} differs from the one in {CONFIG}; "
            "take the folder again from where it was saved"
        )
    return config, content


def _digest(kind: str, config: Mapping[str, Any], payload: bytes) -> str:
    head = json.dumps([kind, FORMAT_VERSION, dict(config)], sort_keys=True).encode()
    return hashlib.sha256(head + b"\0" + payload).hexdigest()


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read: {error.strerror}; expected a folder that `omniform tokenizer train` wrote"
        ) from error
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}; take the folder again from where it was saved") from error
    expected = ("kind", "format_version", "config", "payload", "sha256")
    if not isinstance(record, dict) or not set(expected) <= set(record):
        raise TokenizerError(f"{path} is not the record of a tokenizer: expected the keys {', '.join(expected)}")
    return record


def _write(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    os.replace(draft, path)
