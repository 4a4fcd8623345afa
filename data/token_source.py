"""The tokens of a source, held in memory: of raw shards, encoded now or found in a cache, or of token shards."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniform.data.encoding_jobs import EncodingJob, encode_missing
from omniform.data.folder_lock import locked
from omniform.data.index import ShardIndex
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.data.token_record import RECORD, read_token_record
from omniform.data.token_shards import (
    TOKEN_SHARD_VERSION,
    Failure,
    TokenShard,
    read_token_shard,
    token_shard_identity,
    tokenizer_digest,
)
from omniform.modeling.folder import file_digest
from omniform.tokenizers.base import Latents, Modality, Tokens

_REMEDY = "run `omniform data encode` again, or fetch it again"
_log = logging.getLogger(__name__)


class TokenSource:
    """Tokens of all samples in a folder of shards (encoded now unless they are in the cache) or of token shards.

    Several processes may do this at once with one cache: one encodes, the others wait and read.

    Args:
        folder: holds indexed shards, or what `encode_folder` made of some.
        tokenizers: by modality; spans of other modalities are left out.
        cache_dir: created if need be; token shards need none.
        index_dir: where the indexes of shards are, if not beside them; token shards have none.
        labels: keys of the samples' metadata to keep for `labels_by`.

    Attributes:
        failures: by number, the samples that cannot be read, or of which a span of these modalities cannot be decoded.
        digest: of the shards and the tokenizers, on which all else depends: the same for shards and their tokens.

    Raises:
        DataError: a source that cannot be read, a damaged file, token shards of other tokenizers, or an `index_dir` of
            token shards.
    """

    def __init__(
        self,
        folder: Path,
        tokenizers: Mapping[str, Modality[Any]],
        cache_dir: Path,
        index_dir: Path | None = None,
        *,
        labels: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        digests = {name: tokenizer_digest(tokenizers[name]) for name in sorted(tokenizers)}
        if _holds_tokens(folder, index_dir):
            content_digest, files, shards = _read_folder(folder, digests)
        else:
            reader = ShardReader(folder, index_dir)
            content_digest, files = reader.digest, [shard.shard.name for shard in reader.shards]
            fill_cache([(folder, index_dir)], tokenizers, cache_dir)
            shards = [_cached(shard, digests, cache_dir) for shard in reader.shards]
        self.digest = hashlib.sha256(json.dumps([content_digest, digests]).encode()).hexdigest()
        self._modalities = tuple(digests)
        self._names = [(file, key) for file, shard in zip(files, shards, strict=True) for key in shard.keys]
        self._metadata = [{key: m[key] for key in labels if key in m} for shard in shards for m in shard.metadata]
        firsts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.failures: dict[int, Failure] = {}
        for first, shard in zip(firsts, shards, strict=False):
            for why in shard.failures:
                if why.modality is None or why.modality in digests:
                    self.failures.setdefault(int(first) + why.sample, why)
        stored = shards[0].modalities  # of every shard: those of one source have the same tokenizers
        samples = np.concatenate([s.spans["sample"] + n for s, n in zip(shards, firsts, strict=False)])
        modality, length, grid = (
            np.concatenate([shard.spans[name] for shard in shards]) for name in ("modality", "length", "grid")
        )
        start = np.zeros(len(length), dtype=np.int64)  # of each span within its modality's content
        for place in range(len(stored)):
            here = modality == place
            start[here] = np.cumsum(length[here], dtype=np.int64) - length[here]
        places = np.array([self._modalities.index(m) if m in digests else -1 for m in stored], dtype=np.int32)
        used = (places[modality] >= 0) & ~np.isin(samples, list(self.failures))
        self._first_span = np.searchsorted(samples[used], np.arange(len(self) + 1))
        self._modality, self._length = places[modality][used], length[used]
        self._grid, self._start = grid[used], start[used]
        held = [name for name in digests if name in stored]
        self._content = {name: np.concatenate([shard.content[name] for shard in shards]) for name in held}
        if self.failures:
            tally = Tally()
            for failure in self.failures.values():
                tally.add(failure.reason, failure.message)
            _log.warning("%s: %d of %d samples cannot be decoded: %s", folder, len(tally), len(self), tally)

    def __len__(self) -> int:
        return len(self._names)

    def labels_by(self, keys: Sequence[str]) -> list[str | None]:
        """Return of each sample the values of `keys`, all of them kept, as JSON; None where one is missing."""
        found = self._metadata
        return [json.dumps([m[key] for key in keys]) if all(key in m for key in keys) else None for m in found]

    def describe(self, sample: int) -> str:
        """Return the file and key of a sample, for messages."""
        file, key = self._names[sample]
        return f"{self.folder / file}, sample {key}"

    def spans(self, sample: int) -> list[tuple[str, int]]:
        """Return (modality, number of tokens) of a sample's spans; none if it cannot be decoded."""
        spans = range(self._first_span[sample], self._first_span[sample + 1])
        return [(self._modalities[self._modality[s]], int(self._length[s])) for s in spans]

    def tokens(self, sample: int, place: int) -> Tokens | Latents:
        """Return the codes or vectors of a sample's span at `place`."""
        span = int(self._first_span[sample]) + place
        content = self._content[self._modalities[self._modality[span]]]
        grid = tuple(int(n) for n in self._grid[span] if n) or (0,)
        own = content[self._start[span] : self._start[span] + self._length[span]]
        if own.dtype.kind == "f":
            return Latents(torch.from_numpy(own.astype(np.float32)), grid)
        return Tokens(torch.from_numpy(own.astype(np.int64)), grid)


def count_samples(folder: Path, index_dir: Path | None = None) -> int:
    """Return how many samples a source holds; nothing is encoded.

    Raises:
        DataError: it cannot be read.
    """
    if _holds_tokens(folder, index_dir):
        return read_token_record(folder, _REMEDY).samples
    return len(ShardReader(folder, index_dir))


def _holds_tokens(folder: Path, index_dir: Path | None) -> bool:
    if not (folder / RECORD).exists():
        return False
    if index_dir is not None:
        raise DataError(f"{folder} holds token shards, which have no indexes: remove index_dir ({index_dir})")
    return True


def fill_cache(
    folders: Iterable[tuple[Path, Path | None]],
    tokenizers: Mapping[str, Modality[Any]],
    cache_dir: Path,
    workers: int = 1,
) -> None:
    """Encode the shards of several folders that a cache does not hold yet; token shards are left alone.

    Args:
        folders: each with the folder of its shards' indexes, if they are not beside them.
        workers: see `encode_missing`.

    Raises:
        DataError: see `TokenSource`.
    """
    digests = {name: tokenizer_digest(tokenizers[name]) for name in sorted(tokenizers)}
    jobs = dict[Path, tuple[EncodingJob, int]]()  # by file: shards that are alike are encoded once
    for folder, index_dir in folders:
        if not _holds_tokens(folder, index_dir):
            for shard in ShardReader(folder, index_dir).shards:
                path = _cache_path(token_shard_identity(shard, digests), cache_dir)
                jobs[path] = EncodingJob(shard.shard, index_dir, path), len(shard.samples)
    if all(path.exists() for path in jobs):
        return  # a cache that lacks nothing may lie where nobody can write
    with locked(cache_dir):
        for leftover in cache_dir.glob("*.partial"):  # of processes that were killed
            leftover.unlink(missing_ok=True)
        encode_missing(dict(jobs.values()), functools.partial(_same, tokenizers), digests, workers)


def _same(tokenizers: Mapping[str, Modality[Any]]) -> Mapping[str, Modality[Any]]:
    return tokenizers


def _cached(shard: ShardIndex, digests: Mapping[str, str], cache_dir: Path) -> TokenShard:
    identity = token_shard_identity(shard, digests)
    return read_token_shard(_cache_path(identity, cache_dir), identity, "remove it, and it is encoded again")


def _cache_path(identity: Mapping[str, Any], cache_dir: Path) -> Path:
    return cache_dir / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"


def _read_folder(folder: Path, digests: Mapping[str, str]) -> tuple[str, list[str], list[TokenShard]]:
    """Return the digest of the raw shards, the names of the files, and the tokens that they hold."""
    record = read_token_record(folder, _REMEDY)
    theirs = record.tokenizers
    for name, digest in digests.items():
        if name in theirs and theirs[name] != digest:
            raise DataError(
                f"{folder} holds {name} tokens of the tokenizer {theirs[name]}, but this run's {name} tokenizer is "
                f"{digest}: bring that one back, or run `omniform data encode` with this one"
            )
        if name not in theirs and record.left_out.get(name):
            raise DataError(
                f"{folder} was encoded without a tokenizer for {name!r}, which {record.left_out[name]} spans of its "
                f"source need (this run's is {digest}): run `omniform data encode` with --tokenizer {name}=FOLDER"
            )
    shards = []
    for entry in record.files:
        path = folder / entry.file
        if not path.is_file() or file_digest(path) != entry.sha256:
            raise DataError(f"{path} is missing or damaged: it does not match its digest in {RECORD}: {_REMEDY}")
        identity = {"version": TOKEN_SHARD_VERSION, "shard_sha256": entry.shard_sha256, "tokenizers": dict(theirs)}
        shards.append(read_token_shard(path, identity, _REMEDY))
    return record.source, [entry.file for entry in record.files], shards
