"""The index of a shard: where each sample lies in the tar file, and the digests that reveal any change to it.

`000001.tar` has `000001.index.json` beside it (or, for shards that may not be written to, in a folder of its own). Only
the index is trusted: reading never walks a tar file, so one that was cut short cannot quietly hold fewer samples.
"""

import hashlib
import mmap
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from omniform.data.schema import DataError
from omniform.data.sealed import seal, unseal, write_atomically

INDEX_VERSION = 1
MAX_SAMPLE_BYTES = 256 * 2**20
_BLOCK = 512
Natural = Annotated[int, Field(ge=0, strict=True)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class SampleRecord:
    """Where a sample lies.

    Attributes:
        offset: byte of the shard at which its first header starts.
        size: bytes up to the end of its last member's padding.
        sha256: digest of those bytes, headers and padding included.
        members: by name after the key, (offset from the sample's own, size) of the content.
    """

    key: str
    offset: Natural
    size: Natural
    sha256: Digest
    members: dict[str, tuple[Natural, Natural]]


@dataclass(frozen=True)
class ShardIndex:
    """All samples of one shard, in file order, with the file's size in bytes and digest."""

    shard: Path
    size: int
    sha256: str
    samples: tuple[SampleRecord, ...]

    def to_bytes(self) -> bytes:
        """Return the index file: the same bytes for the same shard, always."""
        records = [
            {"key": s.key, "offset": s.offset, "size": s.size, "sha256": s.sha256, "members": s.members}
            for s in self.samples
        ]
        return seal(
            {
                "format": "omniform-shard-index",
                "version": INDEX_VERSION,
                "shard": self.shard.name,
                "shard_size": self.size,
                "shard_sha256": self.sha256,
                "samples": records,
            }
        )


_RECORDS = TypeAdapter(tuple[SampleRecord, ...])
_SIZE, _DIGEST = TypeAdapter(Natural), TypeAdapter(Digest)


def shard_folders(folder: Path) -> list[Path]:
    """Return the folders that hold shards: `folder` itself, or else its immediate subfolders, in name order.

    Raises:
        DataError: there is no .tar file in either.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: expected one that holds .tar shards")
    if any(folder.glob("*.tar")):
        return [folder]
    found = sorted({path.parent for path in folder.glob("*/*.tar")})
    if not found:
        raise DataError(
            f"{folder} holds no .tar shards, neither itself nor in its subfolders: give the folder of the shards"
        )
    return found


def index_path(shard: Path, index_dir: Path | None = None) -> Path:
    """Return where the index of `shard` is kept."""
    return (index_dir or shard.parent) / f"{shard.stem}.index.json"


def index_shards(folder: Path, index_dir: Path | None = None) -> list[Path]:
    """Write the index of every shard under `folder`, beside it or under `index_dir`, and return the index files.

    An index is written whole or not at all, and only if its shard is a complete archive.

    Raises:
        DataError: no shards, or a shard that is damaged, cut short or not in the format.
    """
    written = []
    for shard_folder in shard_folders(folder):
        target = None if index_dir is None else index_dir / shard_folder.relative_to(folder)
        for shard in sorted(shard_folder.glob("*.tar")):
            path = index_path(shard, target)
            write_atomically(path, index_shard(shard).to_bytes())
            written.append(path)
    return written


def read_index(shard: Path, index_dir: Path | None = None) -> ShardIndex:
    """Read the stored index of `shard`.

    Raises:
        DataError: there is none, it is damaged, of another version or another shard, or places a sample or member
            outside of what holds it.
    """
    path = index_path(shard, index_dir)
    command = f"run `omniform data index {shard.parent}{'' if index_dir is None else f' --index-dir {index_dir}'}`"
    if not path.exists():
        raise DataError(f"{shard} has no index (expected {path}): {command}")
    content = unseal(path, f"check the shard's origin, then {command} to index it anew")
    if content.get("version") != INDEX_VERSION or content.get("shard") != shard.name:
        raise DataError(
            f"{path} is version {content.get('version')} of the index of {content.get('shard')}, "
            f"expected version {INDEX_VERSION} of {shard.name}: {command}"
        )
    try:
        samples = _RECORDS.validate_python(content.get("samples"))
        size = _SIZE.validate_python(content.get("shard_size"))
        digest = _DIGEST.validate_python(content.get("shard_sha256"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "/".join(map(str, first["loc"]))
        raise DataError(f"{path} is no index of a shard ({where or 'its head'}: {first['msg']}): {command}") from error
    for record in samples:
        ends = (start + length for start, length in record.members.values())
        if record.offset + record.size > size or any(end > record.size for end in ends):
            raise DataError(f"{path} places sample {record.key!r} or a member of it outside of its bounds: {command}")
    return ShardIndex(shard, size, digest, samples)


def index_shard(shard: Path) -> ShardIndex:
    """Walk a tar file and return its index. Consecutive members with one key are a sample, as webdataset has it.

    Raises:
        DataError: the file is not a complete tar archive, or holds something that a shard may not.
    """
    if shard.stat().st_size == 0:
        raise DataError(f"{shard} is empty: expected a tar archive; fetch or build it again")
    samples: list[SampleRecord] = []
    seen: set[str] = set()
    with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        stop = 0
        key, start, members = "", 0, dict[str, tuple[int, int]]()
        for info, end in _archive_members(shard, len(content)):
            stop = end
            member_key, name = _split_name(shard, info.name)
            if member_key is None:
                continue
            if member_key != key:
                if member_key in seen:
                    raise DataError(
                        f"{shard} holds files of the sample {member_key!r} in two places: the files of a sample must "
                        "follow one another; sort them by name, and make keys unique"
                    )
                if members:
                    samples.append(_record(content, key, start, members))
                seen.add(member_key)
                key, start, members = member_key, info.offset, {}
            if name in members:
                raise DataError(f"{shard}: sample {key!r} holds the member {name!r} twice: make names unique")
            if end - start > MAX_SAMPLE_BYTES:
                raise DataError(f"{shard}: sample {key!r} takes more than {MAX_SAMPLE_BYTES >> 20} MiB")
            members[name] = (info.offset_data - start, info.size)
        if members:
            samples.append(_record(content, key, start, members))
        tail = content[stop:]
        if len(tail) < 2 * _BLOCK or tail.strip(b"\0"):
            raise DataError(
                f"{shard} is damaged or cut short: after byte {stop} (last whole sample {key!r}) comes no "
                "end-of-archive mark; fetch or build it again"
            )
        return ShardIndex(shard, len(content), hashlib.sha256(content).hexdigest(), tuple(samples))


def _archive_members(shard: Path, size: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield each regular member and the byte after its padding."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse() or info.size < 0:
                    raise DataError(f"{shard}: member {info.name!r} is not a plain file: store plain files only")
                end = info.offset_data + -(-info.size // _BLOCK) * _BLOCK
                if end > size:
                    raise DataError(
                        f"{shard} is cut short: member {info.name!r} ends at byte {end}, the file at {size}; "
                        "fetch or build it again"
                    )
                yield info, end
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard} is not a complete tar archive ({error}): fetch or build it again") from error


def _split_name(shard: Path, path: str) -> tuple[str | None, str]:
    """Return (key, rest) split at the first dot of the last component; key None for names that are no sample's."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise DataError(f"{shard}: member {path!r} points outside of its archive: store plain relative names")
    stem, dot, rest = parts.name.partition(".")
    if not dot or not stem or re.match("__[^/]*__(?:/|$)", path):
        return None, ""
    return str(parts.with_name(stem)), rest.lower()


def _record(content: mmap.mmap, key: str, start: int, members: dict[str, tuple[int, int]]) -> SampleRecord:
    offset, size = list(members.values())[-1]
    length = offset + -(-size // _BLOCK) * _BLOCK
    digest = hashlib.sha256(content[start : start + length]).hexdigest()
    return SampleRecord(key, start, length, digest, members)
