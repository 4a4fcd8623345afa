"""What one sample is: its key, its ordered spans, its metadata, and the named members that a shard stores them in.

A sample of ours has a `json` member that lists the spans and a member per payload:

    000012.json   {"spans": [{"modality": "text", "text": "seven"}, {"modality": "image", "file": "1.png"}], "digit": 7}
    000012.1.png

Image-text pairs as img2dataset writes them (an image member beside `txt`, or `json` with a `caption`) are read as they
are; where both hold a caption, `txt` counts; one that is blank is none, for img2dataset writes an empty `txt` where a
picture had no caption. Nothing here decodes a payload: the tokenizer of the span's modality does, and nothing else
ever will, so a member that no span names (a pickle, say) is never opened.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omniform.errors import OmniformError

FOREIGN_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class DataError(OmniformError):
    """Shards, indexes or a data configuration that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be read. Training counts it and leaves a hole; other samples are not affected."""

    reason = "damaged, or not a sample"


@dataclass(frozen=True)
class RawSpan:
    """Content of one modality, not yet tokenised: either `text`, or `payload` with the `extension` of its file.

    Raises:
        DataError: both or neither are given.
    """

    modality: str
    text: str | None = None
    payload: bytes | None = None
    extension: str = ""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.payload is None):
            raise DataError(f"a span of {self.modality!r} needs either text or a payload, and not both")


@dataclass(frozen=True)
class RawSample:
    """One sample as it lies in a shard.

    Attributes:
        key: names the sample within its shard; has no dot in its last path component.
        metadata: JSON values that are not spans, such as labels; no key "spans".
    """

    key: str
    spans: tuple[RawSpan, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_members(self) -> dict[str, bytes]:
        """Return the members to store, by the part of their names after the key.

        Raises:
            DataError: a key, extension or metadata that the format cannot hold.
        """
        if not re.fullmatch(r"(?:[^/\0]+/)*[^./\0]+", self.key) or self.key.startswith("__"):
            raise DataError(f"sample key {self.key!r}: expected a name without dots, not empty, not starting with __")
        if "spans" in self.metadata:
            raise DataError(f"sample {self.key}: metadata has a key 'spans', which is the format's own: rename it")
        entries: list[dict[str, str]] = []
        payloads: dict[str, bytes] = {}
        for place, span in enumerate(self.spans):
            if span.payload is None:
                entries.append({"modality": span.modality, "text": span.text or ""})
                continue
            if not re.fullmatch(r"[a-z0-9]+", span.extension):
                raise DataError(f"sample {self.key}: extension {span.extension!r}, expected lower-case letters, digits")
            name = f"{place}.{span.extension}"
            entries.append({"modality": span.modality, "file": name})
            payloads[name] = span.payload
        record = {"spans": entries, **self.metadata}
        return {**payloads, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode()}

    @classmethod
    def from_members(cls, key: str, members: Mapping[str, bytes]) -> "RawSample":
        """Rebuild a sample from its members, ours or an image-text pair.

        Raises:
            SampleError: the members do not make a sample.
        """
        record = _read_record(key, members.get("json"))
        if "spans" in record:
            entries = record.pop("spans")
            if not isinstance(entries, list) or not entries:
                raise SampleError(f"sample {key}: its json's 'spans' is {entries!r:.80}, expected a list of spans")
            return cls(key, tuple(_read_span(key, entry, members) for entry in entries), record)
        spans = []
        captions = [_read_text(key, members["txt"])] if "txt" in members else []
        captions += [record["caption"]] if isinstance(record.get("caption"), str) else []
        spans += [RawSpan("text", text=_checked_text(key, caption)) for caption in captions if caption.strip()][:1]
        spans += [
            RawSpan("image", payload=members[name], extension=name) for name in FOREIGN_IMAGES if name in members
        ][:1]
        if not spans:
            raise SampleError(
                f"sample {key} has the members {sorted(members)}: expected a json with 'spans', or a txt or a json "
                f"with 'caption', or one of {', '.join(FOREIGN_IMAGES)}"
            )
        return cls(key, tuple(spans), record)


def _read_record(key: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"sample {key}: its json member is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise SampleError(f"sample {key}: its json member holds a {type(record).__name__}, expected an object")
    return record


def _read_text(key: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SampleError(f"sample {key}: its text is not UTF-8 ({error})") from error


def _checked_text(key: str, text: str) -> str:
    """Refuse halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"sample {key}: its text at position {error.start} is no character") from error
    return text


def _read_span(key: str, entry: object, members: Mapping[str, bytes]) -> RawSpan:
    match entry:
        case {"modality": str(modality), "text": str(text)}:
            return RawSpan(modality, text=_checked_text(key, text))
        case {"modality": str(modality), "file": str(name)} if name in members:
            return RawSpan(modality, payload=members[name], extension=name.rpartition(".")[2])
        case {"modality": str(), "file": str(name)}:
            raise SampleError(f"sample {key} names the file {name!r}, but its members are {sorted(members)}")
    raise SampleError(f"sample {key}: span {entry!r:.80}, expected a modality and either text or file")
