"""The tokens of a source, held in memory: of raw shards, encoded now or found in a cache, or of token shards."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omniform.data.encode import RECORD, encode_shard, locked
from omniform.data.index import ShardIndex
from omniform.data.schema import DataError
from omniform.data.sealed import unseal
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.data.token_shards import (
    TOKEN_SHARD_VERSION,
    TokenShard,
    read_token_shard,
    token_shard_identity,
    tokenizer_digest,
    write_token_shard,
)
from omniform.modeling.folder import file_digest
from omniform.tokenizers.base import Latents, Modality, Tokens

_log = logging.getLogger(__name__)


class TokenSource:
    """Tokens of all samples in a folder of shards (encoded now unless they are in the cache) or of token shards.

    Several processes may do this at once with one cache: one encodes, the others wait and read.

    Args:
        folder: holds indexed shards, or what `encode_folder` made of some.
        tokenizers: by modality; spans of other modalities are left out.
        cache_dir: created if need be; token shards need none.

    Raises:
        DataError: a source that cannot be read, a damaged file, or token shards of other tokenizers.
    """

    def __init__(
        self, folder: Path, tokenizers: Mapping[str, Modality[Any]], cache_dir: Path, index_dir: Path | None = None
    ) -> None:
        self.folder = folder
        digests = {name: tokenizer_digest(tokenizers[name]) for name in sorted(tokenizers)}
        if (folder / RECORD).exists():
            content_digest, files, shards = _read_folder(folder, digests)
        else:
            reader = ShardReader(folder, index_dir)
            content_digest, files = reader.digest, [shard.shard.name for shard in reader.shards]
            with locked(cache_dir):
                shards = [_cached(shard, tokenizers, digests, cache_dir) for shard in reader.shards]
        self.digest = hashlib.sha256(json.dumps([content_digest, digests]).encode()).hexdigest()
        self._modalities = tuple(digests)
        self._names = [(file, key) for file, shard in zip(files, shards, strict=True) for key in shard.keys]
        firsts = np.cumsum([0, *(len(shard.keys) for shard in shards)])
        self.failures = {
            int(first) + i: why for first, s in zip(firsts, shards, strict=False) for i, why in s.failures.items()
        }
        spans = [_spans(shard, self._modalities) for shard in shards]
        samples = np.concatenate([s["sample"] + n for s, n in zip(spans, firsts, strict=False)])
        self._first_span = np.searchsorted(samples, np.arange(len(self) + 1))
        self._modality, self._length, self._grid = (
            np.concatenate([s[name] for s in spans]) for name in ("modality", "length", "grid")
        )
        held = [name for name in digests if all(name in shard.content for shard in shards)]
        self._content = {name: np.concatenate([shard.content[name] for shard in shards]) for name in held}
        self._start = np.zeros(len(self._length), dtype=np.int64)  # of each span within its modality's content
        for place in range(len(self._modalities)):
            here = self._modality == place
            self._start[here] = np.cumsum(self._length[here], dtype=np.int64) - self._length[here]
        if self.failures:
            tally = Tally()
            for failure in self.failures.values():
                tally.add(failure.reason, failure.message)
            _log.warning("%s: %d of %d samples cannot be decoded: %s", folder, len(tally), len(self), tally)

    def __len__(self) -> int:
        return len(self._names)

    def describe(self, sample: int) -> str:
        """Return the file and key of a sample, for messages."""
        file, key = self._names[sample]
        return f"{self.folder / file}, sample {key}"

    def spans(self, sample: int) -> list[tuple[str, int]]:
        """Return (modality, number of tokens) of a sample's spans; none if it cannot be decoded."""
        spans = range(self._first_span[sample], self._first_span[sample + 1])
        return [(self._modalities[self._modality[s]], int(self._length[s])) for s in spans]

    def tokens(self, sample: int, place: int) -> Tokens:
        """Return the codes of a sample's span at `place`, which is of a discrete modality."""
        content, grid = self._span(sample, place)
        return Tokens(torch.from_numpy(content.astype(np.int64)), grid)

    def latents(self, sample: int, place: int) -> Latents:
        """Return the values of a sample's span at `place`, which is of a continuous modality."""
        content, grid = self._span(sample, place)
        return Latents(torch.from_numpy(content.astype(np.float32)), grid)

    def _span(self, sample: int, place: int) -> tuple[Any, tuple[int, ...]]:
        span = int(self._first_span[sample]) + place
        content = self._content[self._modalities[self._modality[span]]]
        grid = tuple(int(n) for n in self._grid[span] if n) or (0,)
        return content[self._start[span] : self._start[span] + self._length[span]], grid


def count_samples(folder: Path, index_dir: Path | None = None) -> int:
    """Return how many samples a source holds; nothing is encoded.

    Raises:
        DataError: it cannot be read.
    """
    if (folder / RECORD).exists():
        return int(_record(folder)["samples"])
    return len(ShardReader(folder, index_dir))


def _cached(
    shard: ShardIndex, tokenizers: Mapping[str, Modality[Any]], digests: Mapping[str, str], cache_dir: Path
) -> TokenShard:
    identity = token_shard_identity(shard, digests)
    path = cache_dir / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"
    if not path.exists():
        write_token_shard(path, encode_shard(shard, tokenizers), identity)
    return read_token_shard(path, identity, "remove it, and it is encoded again")


def _record(folder: Path) -> dict[str, Any]:
    record = unseal(folder / RECORD, "run `omniform data encode` again")
    if (record.get("format"), record.get("version")) != ("omniform-tokens", TOKEN_SHARD_VERSION):
        raise DataError(
            f"{folder / RECORD} is of the format {record.get('format')!r}, version {record.get('version')}; expected "
            f"'omniform-tokens', version {TOKEN_SHARD_VERSION}: run `omniform data encode` again"
        )
    return record


def _read_folder(folder: Path, digests: Mapping[str, str]) -> tuple[str, list[str], list[TokenShard]]:
    """Return the digest of the raw shards, the names of the files, and the tokens that they hold."""
    record = _record(folder)
    theirs = record["tokenizers"]
    for name, digest in digests.items():
        if name in theirs and theirs[name] != digest:
            raise DataError(
                f"{folder} holds {name} tokens of the tokenizer {theirs[name]}, but this run's {name} tokenizer is "
                f"{digest}: bring that one back, or run `omniform data encode` with this one"
            )
        if name not in theirs and record["left_out"].get(name):
            raise DataError(
                f"{folder} was encoded without a tokenizer for {name!r}, which {record['left_out'][name]} spans of its "
                f"source need (this run's is {digest}): run `omniform data encode` with --tokenizer {name}=FOLDER"
            )
    remedy = "run `omniform data encode` again, or fetch it again"
    shards = []
    for entry in record["files"]:
        path = folder / entry["file"]
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise DataError(f"{path} is missing or damaged: it does not match its digest in {RECORD}: {remedy}")
        identity = {"version": TOKEN_SHARD_VERSION, "shard_sha256": entry["shard_sha256"], "tokenizers": theirs}
        shards.append(read_token_shard(path, identity, remedy))
    return record["source"], [entry["file"] for entry in record["files"]], shards


def _spans(shard: TokenShard, modalities: tuple[str, ...]) -> dict[str, Any]:
    """Return a shard's spans of some modalities, numbered by their place among these."""
    places = np.array([modalities.index(m) if m in modalities else -1 for m in shard.modalities], dtype=np.int32)
    modality = places[shard.spans["modality"]] if len(places) else shard.spans["modality"]
    wanted = modality >= 0
    return {"modality": modality[wanted], **{n: shard.spans[n][wanted] for n in ("sample", "length", "grid")}}
