"""Raw shards -> token shards: every sample tokenised once, in a fixed order and batch size.

A folder of token shards has a sealed record, `tokens.json`, beside them, which says what they were made from. It is
written last: an interrupted run continues with the shards that are missing.
"""

import collections
import fcntl
import multiprocessing
import signal
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from omniform.data.index import ShardIndex, shard_folders
from omniform.data.schema import DataError, RawSpan, SampleError
from omniform.data.sealed import seal, unseal, write_atomically
from omniform.data.shards import ShardReader, read_sample
from omniform.data.tally import Tally
from omniform.data.token_shards import (
    TOKEN_SHARD_VERSION,
    Failure,
    TokenShard,
    read_token_shard,
    token_shard_identity,
    tokenizer_digest,
    write_token_shard,
)
from omniform.errors import OmniformError
from omniform.modeling.folder import file_digest
from omniform.tokenizers.base import Continuous, Latents, Modality, Tokens
from omniform.tokenizers.registry import load_modality

BATCH_SIZE = 256
RECORD = "tokens.json"
Job = tuple[ShardIndex, Path]  # a shard, and where its tokens go


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
        tokenizer_folders: by modality; spans of other modalities are left out.
        out: gets a file per shard and tokens.json, for each folder of shards.
        workers: processes that encode shards at the same time, each on one thread; 1 takes this process.

    Returns:
        By name of the folder of shards: number of shards and samples, spans and tokens by modality, spans left out by
        modality, and what cannot be decoded, by reason.

    Raises:
        DataError: shards that cannot be read, `out` holds tokens of something else or damaged ones, or a worker died.
        TokenizerError: a tokenizer that cannot be loaded.
    """
    if workers < 1:
        raise DataError(f"{workers} workers, expected at least 1")
    if out.resolve() == folder.resolve():
        raise DataError(f"the tokens of {folder} cannot lie among its shards: give another --out")
    digests = {name: tokenizer_digest(tokenizer) for name, tokenizer in _load_all(tokenizer_folders).items()}
    readers = {}
    for shard_folder in shard_folders(folder):
        place = shard_folder.relative_to(folder)
        readers[out / place] = ShardReader(shard_folder, None if index_dir is None else index_dir / place)
    with ExitStack() as stack:
        for target, reader in readers.items():
            stack.enter_context(locked(target))
            _check_record(target, _about(reader, digests))
            stack.callback(_remove_partial, target)
        jobs = [(shard, _path(shard, target)) for target, reader in readers.items() for shard in reader.shards]
        _encode_missing(jobs, digests, tokenizer_folders, workers)
        return {reader.folder.name: _seal_folder(reader, digests, target) for target, reader in readers.items()}


def encode_shard(shard: ShardIndex, tokenizers: Mapping[str, Modality[Any]], progress: bool = True) -> TokenShard:
    """Return the tokens of all samples of a shard; those that cannot be decoded are counted, and change no other."""
    modalities = tuple(sorted(tokenizers))
    failures: dict[int, Failure] = {}
    tokens: dict[tuple[int, int], tuple[str, Tokens | Latents]] = {}  # by (sample, place)
    waiting: dict[str, list[tuple[int, int, Any]]] = {name: [] for name in modalities}
    left_out: collections.Counter[str] = collections.Counter()

    def flush(name: str) -> None:
        items = [item for _, _, item in waiting[name]]
        for (sample, place, _), result in zip(waiting[name], _encode(tokenizers[name], items), strict=True):
            if isinstance(result, OmniformError):
                message = f"{shard.shard.name}: sample {shard.samples[sample].key}: {result}"
                failures[sample] = Failure(result.reason, message)
            else:
                tokens[sample, place] = (name, result)
        waiting[name] = []

    if progress and not sys.stderr.isatty():
        print(f"encoding {shard.shard} ({len(shard.samples)} samples)", file=sys.stderr, flush=True)
    bar = tqdm(shard.samples, desc=f"encoding {shard.shard.name}", unit="sample", disable=None) if progress else None
    for number, record in enumerate(shard.samples if bar is None else bar):
        try:
            spans = read_sample(shard, record).spans
            items = [(place, span) for place, span in enumerate(spans) if span.modality in waiting]
            read = [(place, span.modality, _read_item(tokenizers[span.modality], span)) for place, span in items]
        except OmniformError as error:
            where = "" if isinstance(error, SampleError) else f"sample {record.key}: "
            failures[number] = Failure(error.reason, f"{shard.shard.name}: {where}{error}")
            continue
        left_out.update(span.modality for span in spans if span.modality not in waiting)
        for place, name, item in read:
            waiting[name].append((number, place, item))
            if len(waiting[name]) == BATCH_SIZE:
                flush(name)
    for name in modalities:
        flush(name)
    ordered = [(key[0], *tokens[key]) for key in sorted(tokens) if key[0] not in failures]
    grids = [tuple(found.grid) + (0,) * (3 - len(found.grid)) for _, _, found in ordered]
    spans_of = {
        "sample": np.array([sample for sample, _, _ in ordered], dtype=np.int32),
        "modality": np.array([modalities.index(name) for _, name, _ in ordered], dtype=np.int32),
        "length": np.array([len(_content(found)) for _, _, found in ordered], dtype=np.int32),
        "grid": np.array(grids, dtype=np.int32).reshape(-1, 3),
    }
    content = {
        name: np.concatenate([_nothing(tokenizers[name]), *(_content(f) for _, m, f in ordered if m == name)])
        for name in modalities
    }
    keys = tuple(record.key for record in shard.samples)
    return TokenShard(keys, modalities, spans_of, content, dict(sorted(left_out.items())), failures)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other processes out of it until the block ends: they wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends, however that comes
        yield


def _content(tokens: Tokens | Latents) -> Any:
    if isinstance(tokens, Tokens):
        return tokens.codes.numpy().astype(np.int32)
    return tokens.values.numpy().astype(np.float32)


def _nothing(tokenizer: Modality[Any]) -> Any:
    representation = tokenizer.representation
    if isinstance(representation, Continuous):
        return np.zeros((0, representation.channels), np.float32)
    return np.zeros(0, np.int32)


def _read_item(tokenizer: Modality[Any], span: RawSpan) -> Any:
    return tokenizer.read((span.text or "").encode() if span.payload is None else span.payload)


def _encode(tokenizer: Modality[Any], items: Sequence[Any]) -> Sequence[Tokens | Latents | OmniformError]:
    """Return the tokens of each item, or why it has none."""
    try:
        return tokenizer.encode_batch(items) if items else []
    except OmniformError as error:
        # One item cannot be encoded: find it, and keep the others.
        return [error] if len(items) == 1 else [_encode(tokenizer, [item])[0] for item in items]


def _load_all(folders: Mapping[str, Path]) -> dict[str, Modality[Any]]:
    """Return the tokenizers by modality, in name order."""
    tokenizers = {}
    for name, folder in sorted(folders.items()):
        tokenizers[name] = load_modality(folder)
        if tokenizers[name].name != name:
            raise DataError(f"{folder} holds a tokenizer for {tokenizers[name].name}: expected one for {name}")
    return tokenizers


def _path(shard: ShardIndex, target: Path) -> Path:
    return target / f"{shard.shard.stem}.safetensors"


def _about(reader: ShardReader, digests: Mapping[str, str]) -> dict[str, Any]:
    source = {"source": reader.digest, "tokenizers": dict(digests)}
    return {"format": "omniform-tokens", "version": TOKEN_SHARD_VERSION, **source}


def _check_record(target: Path, about: Mapping[str, Any]) -> None:
    if (target / RECORD).exists():
        record = unseal(target / RECORD, "remove it and run the command again")
        if any(record.get(key) != value for key, value in about.items()):
            raise DataError(f"{target} holds tokens of other data or of other tokenizers: give another --out")


def _remove_partial(target: Path) -> None:
    for leftover in target.glob("*.partial"):  # of a process that was killed
        leftover.unlink(missing_ok=True)


def _encode_missing(
    jobs: Sequence[Job], digests: Mapping[str, str], tokenizer_folders: Mapping[str, Path], workers: int
) -> None:
    missing = [(shard, path) for shard, path in jobs if not path.exists()]
    encode = _encoded_here if workers == 1 else _encoded_in_parallel
    n_samples, n_missing = (sum(len(shard.samples) for shard, _ in listed) for listed in (jobs, missing))
    with (
        tqdm(total=n_samples, initial=n_samples - n_missing, desc="encoding", unit="sample", disable=None) as bar,
        closing(encode(missing, digests, tokenizer_folders, workers)) as encoded,
    ):
        for shard in encoded:
            bar.update(len(shard.samples))
            if not sys.stderr.isatty():
                print(f"encoded {shard.shard} ({len(shard.samples)} samples)", file=sys.stderr, flush=True)


def _seal_folder(reader: ShardReader, digests: Mapping[str, str], target: Path) -> dict[str, Any]:
    """Read every token shard again, write the record that lists them, and return what they hold."""
    spans: collections.Counter[str] = collections.Counter()
    tokens: collections.Counter[str] = collections.Counter()
    left_out: collections.Counter[str] = collections.Counter()
    failed, files = Tally(), []
    for shard in reader.shards:
        path = _path(shard, target)
        found = read_token_shard(path, token_shard_identity(shard, digests), "remove it, and it is encoded again")
        spans.update(found.modalities[place] for place in found.spans["modality"].tolist())
        tokens.update({name: len(content) for name, content in found.content.items()})
        left_out.update(found.left_out)
        for why in found.failures.values():
            failed.add(why.reason, why.message)
        files.append({"file": path.name, "shard_sha256": shard.sha256, "sha256": file_digest(path)})
    counts = {"samples": len(reader), "left_out": dict(sorted(left_out.items()))}
    write_atomically(target / RECORD, seal({**_about(reader, digests), **counts, "files": files}))
    return {
        "shards": len(files),
        **counts,
        "spans": dict(sorted(spans.items())),
        "tokens": dict(sorted(tokens.items())),
        "failed": failed.to_json(),
    }


def _encoded_here(
    jobs: Sequence[Job], digests: Mapping[str, str], tokenizer_folders: Mapping[str, Path], workers: int
) -> Generator[ShardIndex, None, None]:
    """Yield each shard once its tokens are written, as one worker would write them."""
    tokenizers = _load_all(tokenizer_folders)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums over more threads may round otherwise
    try:
        for shard, path in jobs:
            _encode_job(shard, path, tokenizers, digests)
            yield shard
    finally:
        torch.set_num_threads(n_threads)


def _encoded_in_parallel(
    jobs: Sequence[Job], digests: Mapping[str, str], tokenizer_folders: Mapping[str, Path], workers: int
) -> Generator[ShardIndex, None, None]:
    """Yield each shard once its tokens are written, in the order in which that happens.

    A worker that dies is noticed and named; closing the generator ends all of them.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads and locks of torch
    waiting = list(reversed(jobs))
    busy: dict[Connection, ShardIndex] = {}

    def hand_out(connection: Connection) -> None:
        job = waiting.pop()
        connection.send(job)
        busy[connection] = job[0]

    processes, finished, shard = [], False, None
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            shard = waiting[-1][0]
            process = context.Process(target=_work, args=(theirs, dict(digests), dict(tokenizer_folders)), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            hand_out(ours)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                shard = busy.pop(connection)
                complaint = connection.recv()
                if complaint is not None:
                    raise DataError(complaint)
                yield shard
                if waiting:
                    hand_out(connection)
                else:
                    connection.send(None)
        finished = True
    except (EOFError, OSError) as error:  # of the connection
        raise DataError(
            f"the process for {shard and shard.shard} died: run the command again to continue, with fewer --workers if "
            "memory ran out"
        ) from error
    finally:
        for process in processes:
            if not finished:
                process.terminate()
            process.join()


def _work(connection: Connection, digests: Mapping[str, str], tokenizer_folders: Mapping[str, Path]) -> None:
    """Encode the shards that come, one after the other, until there are no more or the process is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends its workers
    torch.set_num_threads(1)
    tokenizers: dict[str, Modality[Any]] = {}
    while (job := connection.recv()) is not None:
        shard, path = job
        try:
            tokenizers = tokenizers or _load_all(tokenizer_folders)
            _encode_job(shard, path, tokenizers, digests)
            connection.send(None)
        except (OmniformError, OSError) as error:
            connection.send(f"{shard.shard} cannot be encoded: {error}")


def _encode_job(
    shard: ShardIndex, path: Path, tokenizers: Mapping[str, Modality[Any]], digests: Mapping[str, str]
) -> None:
    write_token_shard(path, encode_shard(shard, tokenizers, progress=False), token_shard_identity(shard, digests))
