"""Token shards: the tokens of one shard's samples in a safetensors file that names what they were made from.

A file carries the digests of the shard, of the tokenizers and of its own content, so that tokens of other data or of
another tokenizer can never be taken for these. It is written whole or not at all. What grows with the samples is in its
arrays, keys and metadata as JSON in bytes, for the header of a safetensors file may hold 100 MB at most.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from omniform.data.index import ShardIndex
from omniform.data.schema import DataError
from omniform.data.sealed import write_atomically
from omniform.tokenizers.base import Modality, folder_digest

TOKEN_SHARD_VERSION = 6
_SAMPLES = "samples.json"
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)
_SPAN_ARRAYS = ("sample", "modality", "length", "grid")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Failure:
    """Why a sample has no tokens of a modality.

    Attributes:
        sample: its number within the shard.
        modality: of the span that cannot be decoded; None if the sample itself cannot be read.
        reason: by which it is counted.
        message: names shard and key.
    """

    sample: int
    modality: str | None
    reason: str
    message: str


@dataclass(frozen=True)
class TokenShard:
    """Tokens of one shard, spans in the order of samples.

    S is the number of spans.

    Attributes:
        keys: of the samples.
        metadata: of the samples; nothing of one that cannot be read.
        modalities: those that have a tokenizer, in name order.
        spans: (S,) int32 arrays `sample` (within the shard), `modality` (its place in `modalities`) and `length`
            (tokens), and `grid` (S, 3), zero beyond a span's axes.
        content: by modality, the tokens of its spans one after the other: codes, (N,) int32, or the values of
            continuous tokens, (N, C) float32.
        left_out: number of spans by modality, of those without a tokenizer.
        failures: in the order of samples and modalities; such a sample has no spans of such a modality.
    """

    keys: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]
    modalities: tuple[str, ...]
    spans: Mapping[str, Array]
    content: Mapping[str, Array]
    left_out: Mapping[str, int]
    failures: tuple[Failure, ...]


def tokenizer_digest(tokenizer: Modality[Any]) -> str:
    """Return the sha256 over everything that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return folder_digest(Path(folder))


def token_shard_identity(shard: ShardIndex, digests: Mapping[str, str]) -> dict[str, Any]:
    """Return what a token shard is made from; `digests` are those of the tokenizers, by modality in name order."""
    return {"version": TOKEN_SHARD_VERSION, "shard_sha256": shard.sha256, "tokenizers": dict(digests)}


def write_token_shard(path: Path, tokens: TokenShard, identity: Mapping[str, Any]) -> None:
    """Write a token shard, the same bytes for the same tokens."""
    arrays = {f"span.{name}": array for name, array in tokens.spans.items()}
    arrays |= {f"content.{name}": array for name, array in tokens.content.items()}
    failures = [[why.sample, why.modality, why.reason, why.message] for why in tokens.failures]
    of_samples = {"keys": tokens.keys, "metadata": tokens.metadata, "failures": failures}
    arrays[_SAMPLES] = np.frombuffer(json.dumps(of_samples).encode(), dtype=np.uint8)
    record = {**identity, "left_out": tokens.left_out, "arrays_sha256": _arrays_digest(arrays)}
    write_atomically(path, save(arrays, {"omniform": json.dumps(record)}))


def read_token_shard_identity(path: Path, remedy: str) -> dict[str, Any]:
    """Return what a token shard says it was made from; its content is not looked at.

    Raises:
        DataError: the file cannot be read; `remedy` ends the message.
    """
    try:
        with safe_open(path, "np") as file:
            record = json.loads((file.metadata() or {})["omniform"])
        return {key: record[key] for key in ("version", "shard_sha256", "tokenizers")}
    except _UNREADABLE as error:
        raise DataError(f"{path} is damaged ({error}): {remedy}") from error


def read_token_shard(path: Path, identity: Mapping[str, Any], remedy: str) -> TokenShard:
    """Read what `write_token_shard` wrote.

    Args:
        remedy: what to do about a file that cannot be used; ends the error's message.

    Raises:
        DataError: the file is missing or damaged, or made from something else.
    """
    try:
        with safe_open(path, "np") as file:
            record = json.loads((file.metadata() or {})["omniform"])
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
        intact = record["arrays_sha256"] == _arrays_digest(arrays)
        samples = json.loads(arrays[_SAMPLES].tobytes())
        found = TokenShard(
            keys=tuple(samples["keys"]),
            metadata=tuple(samples["metadata"]),
            modalities=tuple(record["tokenizers"]),
            spans={name: arrays[f"span.{name}"] for name in _SPAN_ARRAYS},
            content={name: arrays[f"content.{name}"] for name in record["tokenizers"]},
            left_out=dict(record["left_out"]),
            failures=tuple(Failure(*why) for why in samples["failures"]),
        )
        if len(found.metadata) != len(found.keys) or not all(isinstance(entry, dict) for entry in found.metadata):
            raise ValueError(f"its metadata is not one object for each of {len(found.keys)} samples")
    except _UNREADABLE as error:
        raise DataError(f"{path} is damaged ({error}): {remedy}") from error
    if not intact or any(record.get(key) != value for key, value in identity.items()):
        raise DataError(f"{path} does not hold what it should: {remedy}")
    return found


def _arrays_digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
