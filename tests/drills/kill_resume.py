"""Kill a training run with SIGKILL, start the same command again, and compare its end with a run never killed.

    python tests/drills/kill_resume.py --task model --kills 20    `omniform train` on a small world
    python tests/drills/kill_resume.py --task toy --kills 20      the loop alone, with dropout and skipped steps

Moments of the kills go round: while tokens are encoded, while their file is written, any, while a checkpoint is
written, just after, while the result is written. A run is killed and started again until it once comes to its end;
then its last checkpoint and its result are compared, and another run begins. Every start is a fork of this process, so
that a kill costs no import. Prints one JSON line; status 1 if any run differs by one bit, or fewer kills than asked for
hit a live process.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Imported here once for all forks; the first two are what an engine imports when it is made, the last two the command.
import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
import torch.utils.tensorboard
import yaml

import omniform.preview
import omniform.training.run  # noqa: F401
from omniform.cli import app
from omniform.data.digits import build_digits
from omniform.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from omniform.training.tokenizer_task import train_tokenizer

STEPS, EVERY = 40, 4
# What appears in the run folder at the moment of a kill.
MOMENTS = {
    "encoding": "tokens/lock",
    "tokens": "tokens/*.partial",
    "any": None,
    "checkpoint": "checkpoints/.step-*.draft",
    "committed": "checkpoints/step-*",
    "result": ".*model.draft*",
}
LONGEST_DELAY = 0.01  # seconds from what appears to the kill
STARTS_PER_KILL = 4
FORK = multiprocessing.get_context("fork")
SETTINGS = {
    "steps": STEPS,
    "checkpoint": {"every": EVERY, "keep": 2},
    "log": {"every": 3},
    "optim": {"lr": 0.02, "warmup_steps": 4, "ema_decay": 0.9},
}


def prepare_toy(folder: Path) -> Callable[[Path], object]:
    """Return what starts, or goes on with, the toy run in a folder."""
    spec = importlib.util.spec_from_file_location("toy_run", Path(__file__).parents[1] / "training" / "toy_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {**SETTINGS, "engine": {"micro_batch_rows": 4}, "toy": {"dropout": 0.1, "nan_steps": [9]}}
    return partial(module.run_toy, **settings)


def prepare_model(folder: Path) -> Callable[[Path], object]:
    """Make data and tokenizers; return what starts, or goes on with, `omniform train` in a folder."""
    data = build_digits(folder / "data", copies=1, media=False)
    text = {"kind": "sentencepiece", "name": "text", "data": [f"{data}/train-text"], "vocab_size": 300}
    (folder / "text.yaml").write_text(yaml.safe_dump(text))
    torch.manual_seed(0)
    image = ImageTokenizerConfig(widths=(8, 8))
    ImageTokenizer(image, image.build()).save(folder / "image")
    config = {
        **SETTINGS,
        "name": "drill",
        "rows_per_step": 4,
        "model": {
            "decoder": {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48},
            "objectives": {"text": "next_token", "image": "masked"},
        },
        "tokenizers": {
            "text": str(train_tokenizer(folder / "text.yaml", out=folder / "text")),
            "image": f"{folder}/image",
        },
        "data": {
            "row_length": 96,
            "sources": [
                {"path": f"{data}/train", "tasks": {"text->image": 1.0, "image->text": 1.0}},
                {"path": f"{data}/train-text", "tasks": {"text->text": 1.0}, "weight": 0.2},
            ],
        },
        "engine": {"micro_batch_rows": 2},
    }
    (folder / "drill.yaml").write_text(yaml.safe_dump(config))
    return lambda out: app(["train", str(folder / "drill.yaml"), "--out", str(out)])


def final_state(out: Path) -> dict[str, bytes]:
    """Return every byte that the end of a run is judged by: the last checkpoint and the result."""
    folders = (out / "checkpoints" / f"step-{STEPS}", out / "model")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def run_logged(run: Callable[[Path], object], out: Path) -> None:
    """Carry out the run with what it prints in a file beside `out`."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run(out)


def run_and_kill(run: Callable[[Path], object], out: Path, pattern: str | None, delay: float) -> bool:
    """Start the run in `out`; kill it `delay` seconds after something new of `pattern`, or after the start if that is
    None. Return whether it was still running."""
    before = set(out.glob(pattern)) if pattern else set()
    process = FORK.Process(target=run_logged, args=(run, out))
    process.start()
    while pattern and process.is_alive() and not set(out.glob(pattern)) - before:
        process.join(0.001)
    process.join(delay)
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"a run ended with status {process.exitcode}:\n{out.with_suffix('.log').read_text()[-4000:]}")
    return process.exitcode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["model", "toy"], default="model")
    parser.add_argument("--kills", type=int, default=20, help="kills that must hit a live process")
    parser.add_argument("--at", nargs="+", choices=MOMENTS, default=list(MOMENTS), help="moments of the kills")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    delays, hits, differing = random.Random(arguments.seed), dict.fromkeys(arguments.at, 0), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = {"model": prepare_model, "toy": prepare_toy}[arguments.task](folder)
        started = time.monotonic()
        run_and_kill(run, folder / "never", None, delay=600)
        seconds = time.monotonic() - started
        expected, numbers = final_state(folder / "never"), itertools.count(1)
        assert any(path.startswith("model/") for path in expected)
        out = folder / f"run-{next(numbers)}"
        n_compared, finished = 0, True
        for moment in itertools.islice(itertools.cycle(arguments.at), STARTS_PER_KILL * arguments.kills):
            if sum(hits.values()) >= arguments.kills:
                break
            delay = delays.uniform(0, seconds if moment == "any" else LONGEST_DELAY)
            finished = not run_and_kill(run, out, MOMENTS[moment], delay)
            hits[moment] += not finished
            if finished:
                differing, n_compared = differing + (final_state(out) != expected), n_compared + 1
                out = folder / f"run-{next(numbers)}"
        if not finished:
            run_and_kill(run, out, None, delay=600)
            differing, n_compared = differing + (final_state(out) != expected), n_compared + 1
    summary = {"task": arguments.task, "kills": sum(hits.values()), "at": hits, "runs": n_compared}
    print(json.dumps({**summary, "differing": differing}))
    return 1 if differing or sum(hits.values()) < arguments.kills else 0


if __name__ == "__main__":
    sys.exit(main())
