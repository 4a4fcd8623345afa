"""Shards: tar files of samples in webdataset's format, written by its writer and read through our index.

webdataset's own reader loses data silently where a shard is damaged, and its decoders can run pickles, so we read
byte ranges that the index names and check their digests. This is the only file that imports webdataset.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, overload

from omniform.data.index import SampleRecord, ShardIndex, index_path, index_shard, read_index
from omniform.data.schema import DataError, RawSample, SampleError
from omniform.data.sealed import write_atomically


class ShardWriter:
    """Write samples as `000000.tar`, `000001.tar`, ... with their indexes; the same samples give the same bytes.

    Use it as a context manager: a shard appears under its name when it is whole.

    Args:
        folder: created if need be; must hold no shards yet.
        samples_per_shard: at least 1.

    Raises:
        DataError: the folder holds shards already.
    """

    def __init__(self, folder: Path, samples_per_shard: int = 2048) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.tar")):
            raise DataError(f"{folder} holds shards already: write to a new folder, or remove it first")
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.n_samples = 0
        self._partial: Path | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish_shard()
        self._resources.close()
        if self._partial is not None:
            self._partial.unlink()

    def write(self, sample: RawSample) -> None:
        """Add a sample.

        Raises:
            DataError: a sample that the format cannot hold.
        """
        members = sample.to_members()
        if self._partial is None:
            self._begin_shard()
        self._writer.write({"__key__": sample.key, **members})
        self.n_samples += 1
        if self.n_samples % self.samples_per_shard == 0:
            self._finish_shard()

    def _begin_shard(self) -> None:
        from webdataset import TarWriter

        self._partial = self.folder / f"{self.n_samples // self.samples_per_shard:06d}.partial"
        file = self._resources.enter_context(self._partial.open("wb"))
        # A fixed time and owner: the archive must not depend on when and where it was written.
        writer = TarWriter(file, "omniform", "omniform", mtime=0, encoder=False)
        self._writer = self._resources.enter_context(writer)

    def _finish_shard(self) -> None:
        self._resources.close()
        if self._partial is not None:
            shard = self._partial.with_suffix(".tar")
            self._partial.replace(shard)
            self._partial = None
            write_atomically(index_path(shard), index_shard(shard).to_bytes())


class ShardReader(Sequence[RawSample]):
    """All samples of a folder's indexed shards, in the order of shard names; random access, every byte checked.

    Args:
        folder: holds the .tar files.
        index_dir: where the indexes are, if not beside the shards.

    Raises:
        DataError: no shards; a shard without an index, an index without its shard, or a shard that is not as long as
            its index says.
    """

    def __init__(self, folder: Path, index_dir: Path | None = None) -> None:
        self.folder = folder
        paths = sorted(folder.glob("*.tar")) if folder.is_dir() else []
        if not folder.exists():
            raise DataError(f"{folder} does not exist: give the folder that holds the .tar shards, such as DIR/train")
        if not paths:
            raise DataError(f"{folder} holds no .tar shards: give the folder that holds them, such as DIR/train")
        self.shards: tuple[ShardIndex, ...] = tuple(read_index(path, index_dir) for path in paths)
        indexes = {path.name for path in (index_dir or folder).glob("*.index.json")}
        for orphan in sorted(indexes - {index_path(path).name for path in paths}):
            raise DataError(f"{orphan} has lost its shard in {folder}: bring the shard back or remove its index")
        for shard in self.shards:
            size = shard.shard.stat().st_size
            if size != shard.size:
                state = "cut short" if size < shard.size else "longer than indexed"
                raise DataError(
                    f"{shard.shard} is {state}: {size} bytes, its index says {shard.size}; "
                    f"run `omniform data verify {folder}` and fetch or build it again"
                )
        self._places = [(shard, record) for shard in self.shards for record in shard.samples]

    @property
    def digest(self) -> str:
        """The sha256 over the digests of all shards in order: identifies the content."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def describe(self, index: int) -> str:
        """Return the file and key of a sample, for messages."""
        shard, record = self._places[index]
        return f"{shard.shard}, sample {record.key}"

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> RawSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[RawSample]: ...
    def __getitem__(self, index: int | slice) -> RawSample | list[RawSample]:
        """Read samples.

        Raises:
            SampleError: the sample's bytes changed since it was indexed, or do not make a sample.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        shard, record = self._places[index]
        try:
            return read_sample(shard, record)
        except SampleError as error:
            raise SampleError(f"{shard.shard}: {error}") from error


def read_sample(shard: ShardIndex, record: SampleRecord) -> RawSample:
    """Read one sample from where its record says, and check its digest.

    Raises:
        SampleError: the bytes are not those that were indexed, or do not make a sample.
    """
    try:
        with shard.shard.open("rb") as file:
            file.seek(record.offset)
            content = file.read(record.size)
    except OSError as error:
        raise SampleError(f"sample {record.key} cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise SampleError(f"sample {record.key} is damaged: its bytes do not match the digest in the index")
    members = {name: content[start : start + size] for name, (start, size) in record.members.items()}
    return RawSample.from_members(record.key, members)
