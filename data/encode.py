"""The tokens of a source: every sample tokenised once, in a fixed order and batch size, and kept on disk.

One safetensors file per shard, named by the digests of the shard and of the tokenizers, so that tokens of other data or
of another tokenizer can never be taken for these. A file is written whole or not at all; an interrupted run continues
with the first shard that has none.
"""

import fcntl
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from omniform.data.index import ShardIndex
from omniform.data.schema import DataError, RawSpan, SampleError
from omniform.data.sealed import write_atomically
from omniform.data.shards import ShardReader, read_sample
from omniform.data.tally import Tally
from omniform.errors import OmniformError
from omniform.tokenizers.base import Modality, Tokens, folder_digest

ENCODING_VERSION = 2
BATCH_SIZE = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a sample has no tokens: the reason by which it is counted, and a message that names shard and key."""

    reason: str
    message: str


@dataclass(frozen=True)
class EncodedShard:
    """Tokens of one shard, spans in the order of samples.

    N is the number of codes, S of spans.

    Attributes:
        arrays: `codes` (N,); per span (S,) `sample` within the shard, `modality` as a place in `modalities`, `stop` in
            codes; and `grid` (S, 3), zero beyond a span's axes.
        failures: by sample, for those that cannot be decoded and have no spans.
    """

    n_samples: int
    modalities: tuple[str, ...]
    arrays: Mapping[str, npt.NDArray[np.integer[Any]]]
    failures: Mapping[int, Failure]


class EncodedSource:
    """Tokens of all samples in a folder of shards, encoded now unless they are in the cache.

    Several processes may do this at once with one cache: one encodes, the others wait and read.

    Args:
        folder: holds indexed shards.
        tokenizers: by modality; spans of other modalities are left out.
        cache_dir: created if need be.

    Raises:
        DataError: a source that cannot be read, or a damaged file in the cache.
    """

    def __init__(
        self, folder: Path, tokenizers: Mapping[str, Modality], cache_dir: Path, index_dir: Path | None = None
    ) -> None:
        self.folder = folder
        self.reader = ShardReader(folder, index_dir)
        digests = {name: tokenizer_digest(tokenizers[name]) for name in sorted(tokenizers)}
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir):
            shards = [_cached(shard, tokenizers, digests, cache_dir) for shard in self.reader.shards]
        self.digest = hashlib.sha256(json.dumps([self.reader.digest, digests]).encode()).hexdigest()
        self._modalities = tuple(digests)
        firsts = np.cumsum([0, *(shard.n_samples for shard in shards)])
        self.failures = {
            int(first) + i: why for first, s in zip(firsts, shards, strict=False) for i, why in s.failures.items()
        }
        n_codes = np.cumsum([0, *(len(shard.arrays["codes"]) for shard in shards)])
        merged = {name: np.concatenate([s.arrays[name] for s in shards]) for name in ("codes", "modality", "grid")}
        self._codes, self._modality, self._grid = merged["codes"], merged["modality"], merged["grid"]
        stops = [s.arrays["stop"] + n for s, n in zip(shards, n_codes, strict=False)]
        self._bounds = np.concatenate([[0], *stops])
        samples = np.concatenate([s.arrays["sample"] + n for s, n in zip(shards, firsts, strict=False)])
        self._first_span = np.searchsorted(samples, np.arange(len(self) + 1))
        if self.failures:
            tally = Tally()
            for failure in self.failures.values():
                tally.add(failure.reason, failure.message)
            _log.warning("%s: %d of %d samples cannot be decoded: %s", folder, len(tally), len(self), tally)

    def __len__(self) -> int:
        return len(self.reader)

    def spans(self, sample: int) -> list[tuple[str, int]]:
        """Return (modality, number of codes) of a sample's spans; none if it cannot be decoded."""
        spans = range(self._first_span[sample], self._first_span[sample + 1])
        return [(self._modalities[self._modality[s]], int(self._bounds[s + 1] - self._bounds[s])) for s in spans]

    def tokens(self, sample: int, place: int) -> Tokens:
        """Return the tokens of a sample's span at `place`."""
        span = int(self._first_span[sample]) + place
        codes = torch.from_numpy(self._codes[self._bounds[span] : self._bounds[span + 1]].astype(np.int64))
        grid = tuple(int(n) for n in self._grid[span] if n) or (0,)
        return Tokens(codes, grid)


def tokenizer_digest(tokenizer: Modality) -> str:
    """Return the sha256 over everything that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return folder_digest(Path(folder))


@contextmanager
def _lock(cache_dir: Path) -> Iterator[None]:
    with (cache_dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends, however that comes
        yield


def _cached(
    shard: ShardIndex, tokenizers: Mapping[str, Modality], digests: Mapping[str, str], cache_dir: Path
) -> EncodedShard:
    identity = {"version": ENCODING_VERSION, "shard_sha256": shard.sha256, "tokenizers": digests}
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    path = cache_dir / f"{name}.safetensors"
    if not path.exists():
        encoded = _encode_shard(shard, tokenizers, tuple(digests))
        record = {
            **identity,
            "n_samples": encoded.n_samples,
            "failures": [[sample, why.reason, why.message] for sample, why in sorted(encoded.failures.items())],
            "arrays_sha256": _arrays_digest(encoded.arrays),
        }
        write_atomically(path, save(dict(encoded.arrays), {"omniform": json.dumps(record)}))
    return _read(path, identity)


def _read(path: Path, identity: Mapping[str, Any]) -> EncodedShard:
    try:
        with safe_open(path, "np") as file:
            record = json.loads((file.metadata() or {})["omniform"])
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        intact = record["arrays_sha256"] == _arrays_digest(arrays)
        failures = {int(sample): Failure(str(reason), str(message)) for sample, reason, message in record["failures"]}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it, and it is encoded again") from error
    if not intact or any(record.get(key) != value for key, value in identity.items()):
        raise DataError(f"{path} does not hold what its name says: remove it, and it is encoded again")
    return EncodedShard(record["n_samples"], tuple(identity["tokenizers"]), arrays, failures)


def _arrays_digest(arrays: Mapping[str, npt.NDArray[np.integer[Any]]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read_item(tokenizer: Modality, span: RawSpan) -> Any:
    return tokenizer.read((span.text or "").encode() if span.payload is None else span.payload)


def _encode(tokenizer: Modality, items: Sequence[Any]) -> Sequence[Tokens | OmniformError]:
    """Return the tokens of each item, or why it has none."""
    try:
        return tokenizer.encode_batch(items) if items else []
    except OmniformError as error:
        # One item cannot be encoded: find it, and keep the others.
        return [error] if len(items) == 1 else [_encode(tokenizer, [item])[0] for item in items]


def _encode_shard(shard: ShardIndex, tokenizers: Mapping[str, Modality], modalities: tuple[str, ...]) -> EncodedShard:
    failures: dict[int, Failure] = {}
    tokens: dict[tuple[int, int], tuple[str, Tokens]] = {}  # by (sample, place)
    waiting: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in modalities}

    def flush(name: str) -> None:
        items = [item for _, _, item in waiting[name]]
        for (sample, place, _), result in zip(waiting[name], _encode(tokenizers[name], items), strict=True):
            if isinstance(result, Tokens):
                tokens[sample, place] = (name, result)
            else:
                message = f"{shard.shard.name}: sample {shard.samples[sample].key}: {result}"
                failures[sample] = Failure(result.reason, message)
        waiting[name] = []

    if not sys.stderr.isatty():
        print(f"encoding {shard.shard} ({len(shard.samples)} samples)", file=sys.stderr, flush=True)
    records = tqdm(shard.samples, desc=f"encoding {shard.shard.name}", unit="sample", disable=None)
    for number, record in enumerate(records):
        try:
            spans = read_sample(shard, record).spans
            items = [(place, span) for place, span in enumerate(spans) if span.modality in waiting]
            read = [(place, span.modality, _read_item(tokenizers[span.modality], span)) for place, span in items]
        except OmniformError as error:
            where = "" if isinstance(error, SampleError) else f"sample {record.key}: "
            failures[number] = Failure(error.reason, f"{shard.shard.name}: {where}{error}")
            continue
        for place, name, item in read:
            waiting[name].append((number, place, item))
            if len(waiting[name]) == BATCH_SIZE:
                flush(name)
    for name in modalities:
        flush(name)
    ordered = [(key, *tokens[key]) for key in sorted(tokens) if key[0] not in failures]
    grids = [tuple(found.grid) + (0,) * (3 - len(found.grid)) for _, _, found in ordered]
    lengths = [len(found.codes) for _, _, found in ordered]
    arrays: dict[str, npt.NDArray[np.integer[Any]]] = {
        "codes": np.concatenate([np.zeros(0), *(found.codes.numpy() for _, _, found in ordered)]).astype(np.int32),
        "sample": np.array([key[0] for key, _, _ in ordered], dtype=np.int32),
        "modality": np.array([modalities.index(name) for _, name, _ in ordered], dtype=np.int32),
        "stop": np.cumsum(lengths, dtype=np.int64),
        "grid": np.array(grids, dtype=np.int32).reshape(-1, 3),
    }
    return EncodedShard(len(shard.samples), modalities, arrays, failures)
