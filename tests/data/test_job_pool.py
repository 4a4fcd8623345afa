"""Every job is done once, by as many processes as asked for; one that cannot be done is named."""

import multiprocessing
import multiprocessing.resource_tracker
import operator
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from omniform.data.job_pool import done_in_processes, lines_after
from omniform.data.schema import DataError


@pytest.fixture(autouse=True)
def no_process_is_left() -> object:
    """Whatever happened."""
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("n_processes", [1, 2, 3])
def test_every_job_is_done_once(n_processes: int, tmp_path: Path) -> None:
    jobs = [tmp_path / str(n) for n in range(5 if n_processes == 2 else 2)]
    # A second os.mkdir of one folder would raise.
    assert sorted(done_in_processes(jobs, partial(partial, os.mkdir), n_processes)) == jobs
    assert sorted(tmp_path.iterdir()) == jobs
    assert list(done_in_processes([], partial(partial, os.mkdir), n_processes)) == []


def test_what_a_job_raises_is_told() -> None:
    with pytest.raises(DataError, match=r"^x: TypeError: bad operand type for unary -: 'str'$"):
        list(done_in_processes(["x"], partial(partial, operator.neg), 1))


def test_a_process_that_dies_over_a_job_is_noticed_and_the_job_named() -> None:
    with pytest.raises(DataError, match=r"^the process for 3 died: run the command again, with fewer workers"):
        list(done_in_processes([3], partial(partial, os._exit), 1))


def test_processes_that_cannot_start_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    multiprocessing.resource_tracker.ensure_running()  # which has to start
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    with pytest.raises(DataError, match=r"^the process for x{300000} died"):  # a job larger than any pipe holds
        list(done_in_processes(["x" * 300_000] * 2, partial(partial, operator.neg), 2))


FORSAKEN = """
import os, signal
from functools import partial
from omniform.data.job_pool import done_in_processes, lines_after
done = done_in_processes([0, 10**6], partial(partial, __import__("time").sleep), 1)
print(next(done), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    result = subprocess.run([sys.executable, "-c", FORSAKEN], capture_output=True, text=True)
    # Until the pipes are closed by every process that holds them: the worker too.
    assert result.returncode < 0
    assert re.fullmatch(r"0\n", result.stdout)
    assert "Traceback" not in result.stderr


def test_every_line_tells_who_printed_it_and_none_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with lines_after("one: "):
        print("a", end="")
        print("b\n\nc")
        print("error", file=sys.stderr)
        print("begun", end="")
        assert not sys.stderr.isatty()
    print("after")
    assert capsys.readouterr() == ("one: ab\none: \none: c\none: begun\nafter\n", "one: error\n")
