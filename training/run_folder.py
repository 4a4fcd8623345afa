"""The folder of a run: opened for a new run, or for the same run to go on."""

import difflib
import fcntl
import os
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from omniform.errors import OmniformError
from omniform.modeling.config import dump_config, parse_config
from omniform.training.config import FitConfig, TrainConfig

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
COMMAND_VARIABLE = "OMNIFORM_COMMAND"
LOCK = "lock"
_CONTENTS = (CHECKPOINTS, "log.jsonl", "tensorboard", "samples")


class RunFolderError(OmniformError):
    """A run folder that holds another run."""


def open_run_folder(out: Path, config: FitConfig, *, fresh: bool = False, result: str = "model") -> None:
    """Make `out` the folder of the run that `config` describes, or check that it already is.

    The first rank does it, and holds the folder until it ends; the others rely on the launcher to stop them where it
    fails.

    Args:
        fresh: delete what an earlier run left in `out` first.
        result: name of the folder of what the run makes, deleted too by `fresh`.

    Raises:
        RunFolderError: `out` holds a run of another configuration; `log`, `checkpoint`, `engine.zero_stage` and
            `engine.micro_batch_rows` may differ, since the same run can go on with them. Or it holds no run, but
            files under names that a run would overwrite. Or another process is training in it.
    """
    if not is_first_process():
        return
    taken = [name for name in (*_CONTENTS, result) if (out / name).exists()]
    if taken and not (out / CONFIG_FILE).exists():
        raise RunFolderError(
            f"{out} holds {', '.join(taken)}, but no {CONFIG_FILE} of a run, so no run made them: choose another "
            "--out, or move them away"
        )
    lock_folder(out)
    if fresh:
        for name in (*_CONTENTS, result, CONFIG_FILE):  # last what tells that the others are a run's
            path = out / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    path = out / CONFIG_FILE
    if path.exists() and taken:  # a configuration alone is of a run that never began
        _check_same_run(path, config)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(dump_config(config), encoding="utf-8")
    os.replace(draft, path)


def lock_folder(out: Path) -> None:
    """Create `out` if need be and hold its lock until this process ends, however that comes; again is no error.

    Raises:
        RunFolderError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # never closed: that would give up the lock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunFolderError(
            f"another process is training in {out}: wait until it ends or stop it, or choose another --out"
        ) from error


def is_first_process() -> bool:
    """Return whether this is rank 0 of the launched processes, or the only process; needs no process group."""
    return int(os.environ.get("RANK", "0")) == 0


def resume_command() -> str:
    """Return the command line that continues this run: the one that started it, without --fresh."""
    launched = os.environ.get(COMMAND_VARIABLE)
    words = shlex.split(launched) if launched else list(sys.orig_argv)
    program = next((i for i, word in enumerate(words) if Path(word).name == "omniform"), None)
    if program is not None:
        words = ["omniform", *words[program + 1 :]]
    return shlex.join(word for word in words if word != "--fresh")


def _check_same_run(path: Path, config: FitConfig) -> None:
    text = path.read_text(encoding="utf-8")
    try:
        stored = parse_config(type(config), text, source=str(path))
    except OmniformError as error:
        raise RunFolderError(
            f"{path.parent} holds a run that this configuration cannot continue: {error}\n"
            "Choose another --out, or delete that run with --fresh"
        ) from error
    before, after = (
        yaml.safe_dump(yaml.safe_load(dump_config(_essence(c))), sort_keys=False) for c in (stored, config)
    )
    if before != after:
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), str(path), "given", lineterm="", n=0)
        raise RunFolderError(
            f"{path.parent} holds a run of another configuration:\n" + "\n".join(changes) + "\n"
            "Give the configuration of that run to continue it, choose another --out, or delete that run with --fresh"
        )


def _essence(config: FitConfig) -> FitConfig:
    """Return the configuration with everything at its default that does not change what is trained."""
    blank = FitConfig(name="any", steps=1)
    if isinstance(config, TrainConfig):
        config = replace(config, cache_dir=None, encoding_workers=1)
    engine = replace(config.engine, zero_stage=blank.engine.zero_stage, micro_batch_rows=blank.engine.micro_batch_rows)
    return replace(config, engine=engine, log=blank.log, checkpoint=blank.checkpoint)
