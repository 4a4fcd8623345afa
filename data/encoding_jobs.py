"""Shards to be encoded, one job each: what encoding a folder and filling a training run's cache have in common."""

import functools
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omniform.data.encode import encode_shard
from omniform.data.index import read_index
from omniform.data.job_pool import done_in_processes
from omniform.data.token_shards import token_shard_identity, write_token_shard
from omniform.tokenizers.base import Modality

Tokenizers = Mapping[str, Modality[Any]]


@dataclass(frozen=True)
class EncodingJob:
    """A shard, the folder of its index if that is not its own, and the file that its tokens go to."""

    shard: Path
    index_dir: Path | None
    path: Path

    def __str__(self) -> str:
        return str(self.shard)


def encode_missing(
    jobs: Mapping[EncodingJob, int],
    tokenizers: Callable[[], Tokenizers],
    digests: Mapping[str, str],
    workers: int,
) -> None:
    """Encode the shards whose files are missing, and say which are done; the bytes do not depend on `workers`.

    Args:
        jobs: and how many samples each has.
        tokenizers: returns them by modality; called once by every process that encodes, and pickled to get there.
        digests: of the tokenizers, by modality.
        workers: processes that encode at the same time, each on one thread; 1 takes this process.

    Raises:
        DataError: a shard that cannot be read, or a worker died.
    """
    missing = [job for job in jobs if not job.path.exists()]
    if not missing:
        return
    n_done = sum(n_samples for job, n_samples in jobs.items() if job.path.exists())
    start = functools.partial(_encoder, tokenizers, digests)
    encoded = _done_here(missing, start) if workers == 1 else done_in_processes(missing, start, workers)
    with (
        tqdm(total=sum(jobs.values()), initial=n_done, desc="encoding", unit="sample", disable=None) as bar,
        closing(encoded),
    ):
        for job in encoded:
            bar.update(jobs[job])
            if not sys.stderr.isatty():
                print(f"encoded {job} ({jobs[job]} samples)", file=sys.stderr, flush=True)


def _done_here(
    jobs: Sequence[EncodingJob], start: Callable[[], Callable[[EncodingJob], None]]
) -> Generator[EncodingJob, None, None]:
    """Yield each job once it is done, as one worker would do it."""
    n_threads = torch.get_num_threads()
    try:
        encode = start()
        for job in jobs:
            encode(job)
            yield job
    finally:
        torch.set_num_threads(n_threads)


def _encoder(tokenizers: Callable[[], Tokenizers], digests: Mapping[str, str]) -> Callable[[EncodingJob], None]:
    """Return what encodes a shard in this process."""
    torch.set_num_threads(1)  # sums over more threads may round otherwise
    loaded = tokenizers()

    def encode(job: EncodingJob) -> None:
        if not sys.stderr.isatty():
            print(f"encoding {job} ...", file=sys.stderr, flush=True)
        shard = read_index(job.shard, job.index_dir)
        write_token_shard(job.path, encode_shard(shard, loaded), token_shard_identity(shard, digests))

    return encode
