"""Checkpoints with one content for every ZeRO stage and world size, committed whole or not at all.

checkpoints/step-N/
    weights.safetensors     parameters in fp32 by name, and the module's buffers
    ema.safetensors         moving average of the weights, where the run keeps one
    optimizer.safetensors   moments in fp32, "exp_avg/NAME" and "exp_avg_sq/NAME"
    state.json              counters, data position, random state of every rank, the layout that wrote it
    manifest.sha256         digest of every file above

A folder of this name is complete: it is written under another name, flushed to the disk, then renamed.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from omniform.errors import OmniformError
from omniform.modeling.folder import ModelFolderError, commit, save_tensors, verify_manifest, write_manifest
from omniform.training import random_state
from omniform.training.engine import WEIGHTS, Engine
from omniform.training.optim import EMA, MOMENTS

FORMAT_VERSION = 1
_COMPLETE = re.compile(r"step-(\d+)")


class CheckpointError(OmniformError):
    """A checkpoint that does not fit what is trained, or cannot be read."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything of its state that is not a tensor.

    Attributes:
        step: steps done.
        n_skipped: of these, skipped as not finite; n_skipped_in_a_row: the latest of them without a break.
        n_tokens: tokens seen by all ranks.
        position: of the data, as the task gave it.
    """

    step: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0
    n_tokens: float = 0
    position: dict[str, Any] | None = None


def save_checkpoint(folder: Path, engine: Engine, progress: Progress, *, keep: int) -> None:
    """Write `folder`/step-N and remove all but the newest `keep`; every rank must call it.

    Args:
        folder: of the run's checkpoints.
    """
    draft, final = folder / f".step-{progress.step}.draft", folder / f"step-{progress.step}"
    first = engine.rank == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    # One kind of tensor at a time, so that rank 0 never holds more than one full copy (two for the moments).
    weights = _collect(engine, {"": WEIGHTS})
    if first:
        weights |= {name: b.detach().cpu().contiguous().clone() for name, b in engine.buffers().items()}
        save_tensors(weights, draft / "weights.safetensors")
    del weights
    moments = _collect(engine, {f"{key}/": key for key in MOMENTS})
    if first:
        save_tensors(moments, draft / "optimizer.safetensors")
    del moments
    if EMA in engine.state_keys:
        average = _collect(engine, {"": EMA})
        if first:
            save_tensors(average, draft / "ema.safetensors")
    random_states = engine.gather_objects(random_state.capture())
    if first:
        state = {
            "format_version": FORMAT_VERSION,
            "progress": vars(progress),
            "n_updates": engine.n_updates,
            "layout": layout(engine),
            "random_state": random_states,
        }
        (draft / "state.json").write_text(json.dumps(state), encoding="utf-8")
        write_manifest(draft)
        commit(draft, final)
        for old in complete_checkpoints(folder)[:-keep]:
            remove(old)


def load_checkpoint(path: Path, engine: Engine) -> tuple[Progress, list[str]]:
    """Restore engine and random state from a verified checkpoint; every rank must call it.

    Returns:
        The run's progress, and how this layout differs from the one that wrote it: where it does, the run goes on
        from equal weights, but not bit-identically.

    Raises:
        CheckpointError: of another format, or of other parameters than the engine's.
    """
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state.get('format_version')!r}, expected {FORMAT_VERSION}: resume it with the "
            "version of Omniform that wrote it, or start over with --fresh"
        )
    _load(path / "weights.safetensors", engine, {"": WEIGHTS})
    _load(path / "optimizer.safetensors", engine, {f"{key}/": key for key in MOMENTS})
    if EMA in engine.state_keys:
        _load(path / "ema.safetensors", engine, {"": EMA})
    with safe_open(path / "weights.safetensors", "pt") as file:
        for name, buffer in engine.buffers().items():
            buffer.copy_(file.get_tensor(name))
    engine.n_updates = state["n_updates"]
    if engine.rank < len(state["random_state"]):
        random_state.restore(state["random_state"][engine.rank])
    now = layout(engine)
    differences = [f"{key} {state['layout'][key]} -> {now[key]}" for key in now if state["layout"][key] != now[key]]
    return Progress(**state["progress"]), differences


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, or None, after setting damaged ones aside as step-N.damaged.

    Drafts that a killed run left behind are removed.

    Returns:
        The checkpoint, and a sentence on each one set aside.
    """
    notices = []
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    for path in reversed(complete_checkpoints(folder)):
        try:
            verify_manifest(path)
        except ModelFolderError as error:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            notices.append(f"{error}; set aside as {aside.name}, going back to the checkpoint before it")
        else:
            return path, notices
    return None, notices


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints of a run, oldest first."""
    found = [(int(match[1]), p) for p in folder.glob("step-*") if (match := _COMPLETE.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def remove(path: Path) -> None:
    """Delete a checkpoint without ever leaving part of it under a complete name."""
    retired = path.with_name(f".{path.name}.retired")
    os.replace(path, retired)
    shutil.rmtree(retired)


def layout(engine: Engine) -> dict[str, Any]:
    """Return what a bit-identical resume must have in common with the run it continues, beside the machine."""
    return {
        "world_size": engine.world_size,
        "zero_stage": engine.stage,
        "accumulation": engine.accumulation,
        "precision": engine.precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": engine.device.type,
    }


def _collect(engine: Engine, prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Return {prefix + name: tensor} of several keys on rank 0, nothing elsewhere; collective."""
    tensors = {}
    for prefix, key in prefixes.items():
        for name, value in engine.read(key):
            if engine.rank == 0:
                tensors[prefix + name] = value.contiguous()
    return tensors


def _load(path: Path, engine: Engine, prefixes: dict[str, str]) -> None:
    with safe_open(path, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        wanted = {
            prefix + name: (name, key, shape)
            for prefix, key in prefixes.items()
            for name, shape in engine.shapes(key).items()
        }
        wrong = [
            f"{full}: stored {stored.get(full, 'nothing')}, expected {shape}"
            for full, (_, _, shape) in wanted.items()
            if stored.get(full) != shape
        ]
        if wrong:
            listed = "; ".join(wrong[:5]) + ("" if len(wrong) <= 5 else f"; and {len(wrong) - 5} more")
            raise CheckpointError(
                f"{path} is of another module: {listed}. Start over with --fresh, or use another --out"
            )
        for full, (name, key, _) in wanted.items():
            engine.write(name, file.get_tensor(full), key)
