"""The tokens of one shard's samples.

Each modality is encoded for itself, in a fixed order and in batches that depend on nothing but its own spans: its
tokens are the same to the bit whatever other modalities are encoded beside it, and whatever becomes of their spans.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from omniform.data.index import ShardIndex
from omniform.data.schema import RawSpan, SampleError
from omniform.data.shards import read_sample
from omniform.data.token_shards import Array, Failure, TokenShard
from omniform.errors import OmniformError
from omniform.tokenizers.base import Continuous, Latents, Modality, Tokens

BATCH_SIZE = 256
# Elements of decoded items that wait to be encoded together: 64 MiB of floats. A larger item is encoded alone.
MAX_WAITING = 2**24


def encode_shard(shard: ShardIndex, tokenizers: Mapping[str, Modality[Any]]) -> TokenShard:
    """Return the tokens of all samples of a shard; spans that cannot be decoded are counted, and change no other."""
    modalities = tuple(sorted(tokenizers))
    encoders = {name: _SpanEncoder(tokenizers[name]) for name in modalities}
    failures: list[Failure] = []
    metadata: list[Mapping[str, Any]] = []
    left_out: collections.Counter[str] = collections.Counter()
    for number, record in enumerate(shard.samples):
        try:
            sample = read_sample(shard, record)
        except SampleError as error:
            failures.append(Failure(number, None, error.reason, f"{shard.shard.name}: {error}"))
            metadata.append({})
            continue
        metadata.append(sample.metadata)
        for place, span in enumerate(sample.spans):
            if span.modality in encoders:
                encoders[span.modality].add(number, place, span)
            else:
                left_out[span.modality] += 1
    for name, encoder in encoders.items():
        encoder.flush()
        for number, why in encoder.errors.items():
            message = f"{shard.shard.name}: sample {shard.samples[number].key}: {why}"
            failures.append(Failure(number, name, why.reason, message))
    failures.sort(key=lambda failure: (failure.sample, failure.modality or ""))
    ordered = sorted((*key, name) for name, encoder in encoders.items() for key in encoder.kept())
    found = [encoders[name].tokens[sample, place] for sample, place, name in ordered]
    grids = [tuple(tokens.grid) + (0,) * (3 - len(tokens.grid)) for tokens in found]
    spans_of = {
        "sample": np.array([sample for sample, _, _ in ordered], dtype=np.int32),
        "modality": np.array([modalities.index(name) for _, _, name in ordered], dtype=np.int32),
        "length": np.array([len(_content(tokens)) for tokens in found], dtype=np.int32),
        "grid": np.array(grids, dtype=np.int32).reshape(-1, 3),
    }
    keys = tuple(record.key for record in shard.samples)
    content = {name: encoder.content() for name, encoder in encoders.items()}
    counted = dict(sorted(left_out.items()))
    return TokenShard(keys, tuple(metadata), modalities, spans_of, content, counted, tuple(failures))


class _SpanEncoder:
    """Encodes the spans of one modality as they come.

    Attributes:
        tokens: by (sample, place in it).
        errors: by sample, why one of its spans has no tokens.
    """

    def __init__(self, tokenizer: Modality[Any]) -> None:
        self.tokens: dict[tuple[int, int], Tokens | Latents] = {}
        self.errors: dict[int, OmniformError] = {}
        self._tokenizer = tokenizer
        self._waiting: list[tuple[int, int, Any]] = []
        self._n_elements = 0

    def add(self, sample: int, place: int, span: RawSpan) -> None:
        """Decode a span; it is encoded with those after it, as many as may wait."""
        payload = (span.text or "").encode() if span.payload is None else span.payload
        try:
            item = self._tokenizer.read(payload)
        except OmniformError as error:
            self.errors.setdefault(sample, error)
            return
        n_elements = item.numel() if isinstance(item, torch.Tensor) else len(payload)
        if len(self._waiting) == BATCH_SIZE or self._n_elements + n_elements > MAX_WAITING:
            self.flush()
        self._waiting.append((sample, place, item))
        self._n_elements += n_elements

    def flush(self) -> None:
        """Encode what waits."""
        items = [item for _, _, item in self._waiting]
        for (sample, place, _), result in zip(self._waiting, self._encode(items), strict=True):
            if isinstance(result, OmniformError):
                self.errors.setdefault(sample, result)
            else:
                self.tokens[sample, place] = result
        self._waiting, self._n_elements = [], 0

    def kept(self) -> list[tuple[int, int]]:
        """Return the spans of samples of which none failed, in order."""
        return [key for key in sorted(self.tokens) if key[0] not in self.errors]

    def content(self) -> Array:
        """Return the tokens of these, one after the other."""
        representation = self._tokenizer.representation
        nothing: Array = np.zeros(0, np.int32)
        if isinstance(representation, Continuous):
            nothing = np.zeros((0, representation.channels), np.float32)
        return np.concatenate([nothing, *(_content(self.tokens[key]) for key in self.kept())])

    def _encode(self, items: Sequence[Any]) -> Sequence[Tokens | Latents | OmniformError]:
        """Return the tokens of each item, or why it has none."""
        try:
            return self._tokenizer.encode_batch(items) if items else []
        except OmniformError as error:
            # One item cannot be encoded: find it, and keep the others.
            return [error] if len(items) == 1 else [self._encode([item])[0] for item in items]


def _content(tokens: Tokens | Latents) -> Array:
    if isinstance(tokens, Tokens):
        return tokens.codes.numpy().astype(np.int32)
    return tokens.values.numpy().astype(np.float32)
