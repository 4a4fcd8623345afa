"""Folders of shards -> folders of token shards, each with the record that makes it a source.

The record is written last: an interrupted run continues with the shards that are missing.
"""

import collections
import functools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniform.data.encoding_jobs import EncodingJob, encode_missing
from omniform.data.folder_lock import locked
from omniform.data.index import ShardIndex, shard_folders
from omniform.data.schema import DataError
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.data.token_record import RECORD, TokenFile, TokenRecord, read_token_record
from omniform.data.token_shards import (
    read_token_shard,
    read_token_shard_identity,
    token_shard_identity,
    tokenizer_digest,
)
from omniform.modeling.folder import file_digest
from omniform.tokenizers.base import Modality
from omniform.tokenizers.registry import load_modality

_REMEDY = "remove it, and it is encoded again"


def encode_folder(
    folder: Path,
    tokenizer_folders: Mapping[str, Path],
    out: Path,
    *,
    index_dir: Path | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Encode a folder of shards, or each of its subfolders of shards, into token shards under `out`.

    The files are the same to the byte whatever `workers` is. Shards that `out` already holds are not encoded again.

    Args:
        tokenizer_folders: by modality: folders of tokenizers, or the run folders that hold them as tokenizer/; spans of
            other modalities are left out.
        out: gets a file per shard and tokens.json, for each folder of shards.
        workers: processes that encode shards at the same time, each on one thread; 1 takes this process.

    Returns:
        By name of the folder of shards: number of shards and samples, spans and tokens by modality, spans left out by
        modality, and what cannot be decoded, by reason.

    Raises:
        DataError: shards that cannot be read, `out` holds shards, tokens of something else or damaged ones, or a worker
            died.
        TokenizerError: a tokenizer that cannot be loaded.
    """
    if workers < 1:
        raise DataError(f"{workers} workers, expected at least 1")
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in _load_all(tokenizer_folders).items()}
    targets = []
    for shard_folder in shard_folders(folder):
        place = shard_folder.relative_to(folder)
        indexes = None if index_dir is None else index_dir / place
        targets.append(_Target(out / place, ShardReader(shard_folder, indexes), indexes, digests))
    for target in targets:
        target.refuse_shards()
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(locked(target.folder))
        for target in targets:
            target.refuse_other_tokens()
            stack.callback(target.remove_partial)
        jobs = {job: n_samples for target in targets for job, n_samples in target.jobs().items()}
        encode_missing(jobs, functools.partial(_load_all, dict(tokenizer_folders)), digests, workers)
        return {target.reader.folder.name: target.seal() for target in targets}


@dataclass(frozen=True)
class _Target:
    """A folder for the tokens of a folder of shards."""

    folder: Path
    reader: ShardReader
    index_dir: Path | None
    digests: Mapping[str, str]

    def refuse_shards(self) -> None:
        """Tokens among shards would take their place where both are sought."""
        if any(self.folder.glob("*.tar")):
            raise DataError(f"{self.folder} holds shards, among which no tokens can lie: give another --out")

    def refuse_other_tokens(self) -> None:
        """Refuse tokens of other shards or tokenizers before anything is encoded beside them."""
        if (self.folder / RECORD).exists():
            record = read_token_record(self.folder, "remove it and run the command again")
            if (record.source, record.tokenizers) != (self.reader.digest, self.digests):
                raise DataError(f"{self.folder} holds tokens of other data or of other tokenizers: give another --out")
        expected = {self._path(shard): token_shard_identity(shard, self.digests) for shard in self.reader.shards}
        others = [
            path.name
            for path in sorted(self.folder.glob("*.safetensors"))
            if path not in expected or read_token_shard_identity(path, _REMEDY) != expected[path]
        ]
        if others:
            raise DataError(
                f"{self.folder} holds {len(others)} token shards (the first is {others[0]}) of other data or of other "
                "tokenizers: give another --out"
            )

    def remove_partial(self) -> None:
        """Remove what processes that were killed have left."""
        for leftover in self.folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)

    def jobs(self) -> dict[EncodingJob, int]:
        """Return what is to be done, and the number of samples of each."""
        shards = self.reader.shards
        return {EncodingJob(s.shard, self.index_dir, self._path(s)): len(s.samples) for s in shards}

    def seal(self) -> dict[str, Any]:
        """Read every token shard again, write the record that lists them, and return what they hold."""
        spans: collections.Counter[str] = collections.Counter()
        tokens: collections.Counter[str] = collections.Counter()
        left_out: collections.Counter[str] = collections.Counter()
        failed, files = Tally(), []
        for shard in self.reader.shards:
            path = self._path(shard)
            found = read_token_shard(path, token_shard_identity(shard, self.digests), _REMEDY)
            spans.update(found.modalities[place] for place in found.spans["modality"].tolist())
            tokens.update({name: len(content) for name, content in found.content.items()})
            left_out.update(found.left_out)
            for why in found.failures:
                failed.add(why.reason, why.message)
            files.append(TokenFile(path.name, shard.sha256, file_digest(path)))
        record = TokenRecord(
            self.reader.digest, self.digests, len(self.reader), dict(sorted(left_out.items())), tuple(files)
        )
        record.write(self.folder)
        return {
            "shards": len(files),
            "samples": record.samples,
            "left_out": record.left_out,
            "spans": dict(sorted(spans.items())),
            "tokens": dict(sorted(tokens.items())),
            "failed": failed.to_json(),
        }

    def _path(self, shard: ShardIndex) -> Path:
        return self.folder / f"{shard.shard.stem}.safetensors"


def _load_all(folders: Mapping[str, Path]) -> dict[str, Modality[Any]]:
    """Return the tokenizers by modality, in name order."""
    tokenizers = {}
    for name, folder in sorted(folders.items()):
        tokenizers[name] = load_modality(folder)
        if tokenizers[name].name != name:
            raise DataError(f"{folder} holds a tokenizer for {tokenizers[name].name}: expected one for {name}")
    return tokenizers
