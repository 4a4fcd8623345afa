"""Kill a small training run with SIGKILL, start the same command again, and compare its end with a run never killed.

    python tests/drills/kill_resume.py --kills 20              20 runs, each killed at a random moment
    python tests/drills/kill_resume.py --at draft commit       killed while a checkpoint is written, and just after

Every run is a fork of this process, so that a kill costs no import. Prints one JSON line per run; status 1 if any
differs by one bit from the run never killed.
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

# Imported here once for all forks; the first two are what an engine imports when it is made.
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
import torch.utils.tensorboard

STEPS, EVERY = 48, 6
FORK = multiprocessing.get_context("fork")


def load_toy() -> Callable[..., object]:
    spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).parents[1] / "training" / "toy_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_toy


def start(run_toy: Callable[..., object], out: Path) -> BaseProcess:
    """Start, or go on with, the run in `out`."""
    settings = {
        "steps": STEPS,
        "checkpoint": {"every": EVERY, "keep": 2},
        "log": {"every": 3},
        "optim": {"lr": 0.02, "warmup_steps": 4, "ema_decay": 0.9},
        "engine": {"micro_batch_rows": 4},
        "toy": {"dropout": 0.1, "nan_steps": [9]},
    }
    process = FORK.Process(target=run_toy, args=(out,), kwargs=settings)
    process.start()
    return process


def final_state(out: Path) -> dict[str, bytes]:
    """Return every byte that the end of a run is judged by: the last checkpoint and the result."""
    folders = (out / "checkpoints" / f"step-{STEPS}", out / "model")
    return {str(p.relative_to(out)): p.read_bytes() for folder in folders for p in sorted(folder.iterdir())}


def kill_when(process: BaseProcess, condition: Callable[[], bool]) -> bool:
    """Kill the process as soon as `condition` holds; return whether it was still running."""
    while process.is_alive() and not condition():
        pass
    process.kill()
    process.join()
    return process.exitcode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="runs killed at a random moment")
    parser.add_argument("--at", nargs="*", default=[], choices=["draft", "commit"], help="runs killed at this point")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_toy, moments, differing = load_toy(), random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        start(run_toy, Path(folder, "never")).join()
        seconds = time.monotonic() - started
        expected = final_state(Path(folder, "never"))
        points = [*arguments.at, *["random"] * arguments.kills]
        for number, point in enumerate(points):
            out = Path(folder, f"run-{number}")
            process = start(run_toy, out)
            if point == "random":
                moment = time.monotonic() + moments.uniform(0, seconds)
                killed = kill_when(process, lambda moment=moment: time.monotonic() >= moment)
            elif point == "draft":
                third = out / "checkpoints" / f".step-{3 * EVERY}.draft"
                killed = kill_when(process, third.exists)
            else:
                third = out / "checkpoints" / f"step-{3 * EVERY}"
                killed = kill_when(process, third.exists)
            found = sorted(p.name for p in (out / "checkpoints").glob("*")) if out.exists() else []
            start(run_toy, out).join()
            same = final_state(out) == expected
            differing += not same
            print(json.dumps({"run": number, "at": point, "killed": killed, "found": found, "identical": same}))
    print(json.dumps({"runs": len(points), "differing": differing}))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
