import dataclasses
import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from omniform.training.checkpoint import (
    CheckpointError,
    Progress,
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import Engine
from omniform.training.step import train_step

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


def make(toy: ModuleType, stage: int, precision: str = "fp32", ema_decay: float | None = 0.8) -> tuple:
    config = FitConfig(
        name="toy",
        steps=9,
        rows_per_step=8,
        optim=OptimConfig(lr=0.05, ema_decay=ema_decay),
        engine=EngineConfig(zero_stage=stage, precision=precision, micro_batch_rows=4),
    )
    task = toy.Toy(8, 4)
    return task, Engine(task.module, config)


def train(task, engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        result = train_step(engine, task.term_weights, task.micro_batches(step, 0, 1), 0.05)
        losses.append(float((result.loss_sums.double() / result.counts.clamp(min=1)).sum()))
    return losses


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{name}:{key}": t for name in FILES for key, t in load_file(checkpoint / name).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def saved(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[float]]]:
    """A checkpoint after 3 steps from every stage, and the losses of the 4 steps that followed it."""
    folders = {}
    for stage in range(4):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        task, engine = make(toy, stage)
        train(task, engine, 0, 3)
        save_checkpoint(folder, engine, Progress(step=3), keep=1)
        folders[stage] = folder / "step-3", train(task, engine, 3, 7)
        save_checkpoint(folder, engine, Progress(step=7), keep=2)
        engine.close()
    return folders


@pytest.mark.parametrize(("before", "after"), list(itertools.product(range(4), range(4))))
def test_every_stage_resumes_what_every_stage_wrote(
    toy: ModuleType, saved: dict, tmp_path: Path, before: int, after: int
) -> None:
    path, losses = saved[before]
    task, engine = make(toy, after)
    progress, differences = load_checkpoint(path, engine)
    assert progress.step == 3
    assert bool(differences) == (before != after)
    save_checkpoint(tmp_path, engine, progress, keep=1)
    assert equal(tensors(path), tensors(tmp_path / "step-3"))  # all state survives the change of stage, to the bit
    resumed = train(task, engine, 3, 7)
    # The bound for another layout: rounding of fp32 sums taken in another order, four steps long.
    assert resumed == pytest.approx(losses, rel=1e-5)
    if before == after:
        save_checkpoint(tmp_path, engine, Progress(step=7), keep=1)
        assert resumed == losses
        assert equal(tensors(path.with_name("step-7")), tensors(tmp_path / "step-7"))
    engine.close()


def test_bf16_master_weights_cross_to_fp32_and_back(toy: ModuleType, tmp_path: Path) -> None:
    task, engine = make(toy, 2, "bf16")
    train(task, engine, 0, 3)
    save_checkpoint(tmp_path / "bf16", engine, Progress(step=3), keep=1)
    engine.close()
    _, engine = make(toy, 3)
    load_checkpoint(tmp_path / "bf16" / "step-3", engine)
    save_checkpoint(tmp_path / "fp32", engine, Progress(step=3), keep=1)
    engine.close()
    assert equal(tensors(tmp_path / "bf16" / "step-3"), tensors(tmp_path / "fp32" / "step-3"))


def test_only_the_newest_are_kept(toy: ModuleType, tmp_path: Path) -> None:
    _, engine = make(toy, 2)
    for step in (8, 9, 10, 100):
        save_checkpoint(tmp_path, engine, Progress(step=step), keep=2)
    engine.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert complete_checkpoints(tmp_path)[-1].name == "step-100"  # by number, not by name


@pytest.mark.parametrize("name", [*FILES, "state.json", "manifest.sha256"])
def test_one_flipped_bit_is_found_and_the_checkpoint_before_is_taken(
    toy: ModuleType, tmp_path: Path, name: str
) -> None:
    _, engine = make(toy, 2)
    for step in (1, 2):
        save_checkpoint(tmp_path, engine, Progress(step=step), keep=2)
    engine.close()
    damaged = tmp_path / "step-2" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    path, [notice] = newest_checkpoint(tmp_path)
    assert path == tmp_path / "step-1"
    assert "step-2" in notice
    assert "set aside as step-2.damaged" in notice


def test_leftovers_of_a_killed_run_are_removed_and_never_read(toy: ModuleType, tmp_path: Path) -> None:
    _, engine = make(toy, 2)
    save_checkpoint(tmp_path, engine, Progress(step=1), keep=2)
    engine.close()
    for leftover in (".step-2.draft", ".step-0.retired"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "weights.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-1", [])
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])


def test_checkpoint_of_another_module_is_refused_by_name_and_shape(toy: ModuleType, tmp_path: Path) -> None:
    _, engine = make(toy, 2)
    save_checkpoint(tmp_path, engine, Progress(step=1), keep=2)
    path = tmp_path / "step-1"
    weights = load_file(path / "weights.safetensors")
    del weights["value.bias"]
    weights["label.weight"] = torch.zeros(4, 7)
    save_file(weights, path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"value.bias: stored nothing, .*label.weight: stored \(4, 7\), expected"):
        load_checkpoint(path, engine)
    engine.close()


def test_checkpoint_of_a_later_format_is_refused(toy: ModuleType, tmp_path: Path) -> None:
    _, engine = make(toy, 2)
    save_checkpoint(tmp_path, engine, Progress(step=1), keep=2)
    state = json.loads((tmp_path / "step-1" / "state.json").read_text())
    (tmp_path / "step-1" / "state.json").write_text(json.dumps(state | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 99, expected 1"):
        load_checkpoint(tmp_path / "step-1", engine)
    engine.close()


def test_progress_round_trips(toy: ModuleType, tmp_path: Path) -> None:
    _, engine = make(toy, 1, ema_decay=None)
    progress = Progress(step=4, n_skipped=2, n_skipped_in_a_row=1, n_tokens=12.0, position={"cursor": [1, 2]})
    save_checkpoint(tmp_path, engine, progress, keep=1)
    assert not (tmp_path / "step-4" / "ema.safetensors").exists()
    loaded, differences = load_checkpoint(tmp_path / "step-4", engine)
    assert dataclasses.asdict(loaded) == dataclasses.asdict(progress)
    assert differences == []
    engine.close()
