"""Jobs shared out among processes. A worker does one job after the other, and what it makes goes to files."""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TextIO, TypeVar

from omniform.data.schema import DataError
from omniform.errors import OmniformError

JobT = TypeVar("JobT")


def done_in_processes(
    jobs: Sequence[JobT], start: Callable[[], Callable[[JobT], object]], n_processes: int
) -> Generator[JobT, None, None]:
    """Yield each job once it is done, in the order in which that happens.

    The processes end when the generator is closed, and when this process ends, however that comes.

    Args:
        jobs: can be pickled, in few bytes; messages name a job by its `str`.
        start: can be pickled; called once in each process, it returns what does a job.

    Raises:
        DataError: a job failed, or its process died.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads and locks of torch
    processes: dict[Connection, SpawnProcess] = {}
    waiting, busy, finished = list(reversed(jobs)), dict[Connection, JobT](), False
    try:
        for _ in range(min(n_processes, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, pickle.dumps(start)), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        ready = list(processes)
        while ready:
            for connection in ready[: len(waiting)]:
                busy[connection] = waiting.pop()
                with _death_named(busy[connection]):
                    connection.send(busy[connection])
            ready = [found for found in wait(list(busy)) if isinstance(found, Connection)] if busy else []
            for connection in ready:
                job = busy.pop(connection)
                with _death_named(job):
                    complaint = connection.recv()
                if complaint is not None:
                    raise DataError(f"{job}: {complaint}")
                yield job
        finished = True
    finally:
        for connection, process in processes.items():
            connection.close()  # which tells the worker that there are no more jobs
            if not finished:
                process.terminate()
            process.join()


@contextmanager
def _death_named(job: object) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # of the connection
        raise DataError(
            f"the process for {job} died: run the command again, with fewer workers if memory ran out"
        ) from error


def _work(connection: Connection, start: bytes) -> None:
    """Do the jobs that come, one after the other, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it as well, and ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    do: Callable[[object], object] | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        complaint = None
        try:
            # What starts it is unpickled here, for that may import much: Ctrl-C is not to fall into it.
            do = do or pickle.loads(start)()
            do(job)
        except OmniformError as error:
            complaint = str(error)
        except Exception as error:  # whatever it is: the parent raises it
            complaint = f"{type(error).__name__}: {error}"
        connection.send(complaint)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def lines_after(prefix: str) -> Iterator[None]:
    """Put a prefix before every line that is printed meanwhile: of processes that print at once, it tells which did."""
    out, errors = _Prefixed(sys.stdout, prefix), _Prefixed(sys.stderr, prefix)
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            yield
    finally:
        out.end()
        errors.end()


class _Prefixed(io.TextIOBase):
    """A stream that passes whole lines on to another, so that those of several processes do not mix.

    It is no terminal, so that what draws over its own last line prints lines instead.
    """

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream, self._prefix, self._begun = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        self._stream.write("".join(f"{self._prefix}{line}\n" for line in lines))
        self._stream.flush()
        return len(text)

    def end(self) -> None:
        """Pass on a line that was begun."""
        if self._begun:
            self.write("\n")
