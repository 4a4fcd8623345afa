"""Several local processes for one training command, through torchrun."""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence

from omniform.errors import COMPLAINTS_VARIABLE, OmniformError
from omniform.training.run_folder import COMMAND_VARIABLE

_MODULE = "omniform.cli"


def launch_command(n_processes: int, arguments: Sequence[str]) -> list[str]:
    """Return the torchrun command line that runs `omniform ARGUMENTS` in `n_processes` processes of this host.

    Args:
        arguments: of `omniform`, for example ["train", "config.yaml", "optim.lr=1e-3"].

    Raises:
        OmniformError: fewer than one process, or a command other than train.
    """
    if n_processes < 1:
        raise OmniformError(f"--nproc is {n_processes}, expected at least 1")
    if not arguments or arguments[0] != "train":
        given = shlex.join(arguments) or "nothing"
        raise OmniformError(
            f"launch was given {given!r} to run, expected: omniform launch --nproc N -- train CONFIG ..."
        )
    # After "--" torchrun takes options as the command's own; before it, abbreviations of torchrun's would match.
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={n_processes}", "-m", "--"]
    return ["torchrun", *options, _MODULE, *arguments]


def launch(n_processes: int, arguments: Sequence[str], *, dry_run: bool = False) -> int:
    """Run `omniform ARGUMENTS` in `n_processes` processes and return the exit status for this one.

    A SIGINT or SIGTERM is passed on: every process writes its part of a checkpoint, and the status is 130 or 143. An
    error that all processes meet is printed by one of them.

    Args:
        dry_run: print the command instead of running it.
    """
    command = launch_command(n_processes, arguments)
    # The processes share the cores; each one alone would take them all.
    threads = str(max(1, len(os.sched_getaffinity(0)) // n_processes))
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
        # On one host the loopback device always works; the host's own name may resolve to nothing reachable.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    if dry_run:
        settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print(*settings, shlex.join(command))
        return 0
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    os.environ.update(environment)
    os.environ[COMMAND_VARIABLE] = shlex.join(["omniform", "launch", "--nproc", str(n_processes), "--", *arguments])
    try:
        with tempfile.TemporaryDirectory(prefix="omniform-") as complaints:
            os.environ[COMPLAINTS_VARIABLE] = complaints
            main(command[1:])
    except SignalException as stopped:
        print(f"omniform: stopped by {signal.Signals(stopped.sigval).name}", file=sys.stderr)
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = f"exit status {failure.exitcode}" if failure.exitcode > 0 else f"signal {-failure.exitcode}"
        print(f"process {rank} ended with {how}, and the others were stopped", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
