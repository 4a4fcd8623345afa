"""Two processes over gloo, and a run killed in the middle: real processes, each started once for many checks."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from omniform.errors import OmniformError
from omniform.training.checkpoint import load_checkpoint, save_checkpoint
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import Engine
from omniform.training.launcher import launch, launch_command

HERE = Path(__file__).parent
SETTINGS = {"steps": 5, "optim": {"lr": 0.05, "ema_decay": 0.8, "clip_grad_norm": 0.5}, "log": {"every": 1}}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def tensors(out: Path, step: int = 5) -> dict[str, torch.Tensor]:
    folder = out / "checkpoints" / f"step-{step}"
    names = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")
    return {f"{n}:{k}": t for n in names for k, t in load_file(folder / n).items() if k != "n_forward"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: all labels on rank 0, which has a quarter of the rows; no labels at odd steps; NaN at 3."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for stage in range(4):
        engine = {"zero_stage": stage, "precision": "fp32", "micro_batch_rows": 2}
        log = {"every": 1, "gradient_norms": stage < 3}
        settings = {**SETTINGS, "engine": engine, "checkpoint": {"every": 2, "keep": 9}, "log": log}
        whole = {**settings, "out": f"{folder}/z{stage}", "toy": {"uneven": True, "nan_steps": [3], "dropout": 0.0}}
        runs.append(whole)
        if stage >= 2:
            again = {**whole, "out": f"{folder}/again{stage}"}
            runs += [{**again, "toy": {**whole["toy"], "sigterm_at": 2}}, again]
    (folder / "runs.json").write_text(json.dumps(runs))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    done = run(*torchrun, HERE / "toy_run.py", folder / "runs.json")
    assert done.returncode == 0, done.stderr
    # Rank 1 alone had the signal; both ranks of both runs stopped.
    assert done.stdout.splitlines() == ["stopped with status 143"] * 4
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_with_unequal_counts_equal_one_process(
    two: Path, toy: ModuleType, tmp_path: Path, stage: int
) -> None:
    settings = {**SETTINGS, "log": {"every": 1, "gradient_norms": True}}
    toy.run_toy(tmp_path, **settings, engine={"zero_stage": 2, "precision": "fp32"}, toy={"nan_steps": [3]})
    one, both = tensors(tmp_path), tensors(two / f"z{stage}")
    for name, expected in one.items():
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    logs = [
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        for out in (tmp_path, two / f"z{stage}")
    ]
    for ours, theirs in zip(*logs, strict=True):
        # The step with NaN, on rank 0 only, was skipped by both: it has no loss, and its norm is not a number.
        assert ours["skipped"] == theirs["skipped"] == (1 if ours["step"] > 3 else 0)
        if ours["step"] == 4:
            assert ours["grad_norm"] is theirs["grad_norm"] is None
            assert "loss" not in ours.keys() | theirs.keys()
        else:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_stopped_and_continued_end_bit_identical(two: Path, stage: int) -> None:
    whole, again = two / f"z{stage}", two / f"again{stage}"
    assert (again / "checkpoints" / "step-3").is_dir()  # written by the signal
    for name in ("weights", "ema", "optimizer"):
        file = Path("checkpoints", "step-5", f"{name}.safetensors")
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    assert (whole / "model" / "toy.safetensors").read_bytes() == (again / "model" / "toy.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_checkpoint_is_read_whole_by_one_process(
    two: Path, toy: ModuleType, tmp_path: Path, stage: int
) -> None:
    config = FitConfig(
        name="toy",
        steps=5,
        rows_per_step=8,
        optim=OptimConfig(**SETTINGS["optim"]),
        engine=EngineConfig(zero_stage=stage, precision="fp32"),
    )
    engine = Engine(toy.Toy(8, 8).module, config)
    progress, differences = load_checkpoint(two / "z3" / "checkpoints" / "step-2", engine)
    save_checkpoint(tmp_path / "checkpoints", engine, progress, keep=1)
    engine.close()
    assert "world_size 2 -> 1" in differences
    stored, read = tensors(two / "z3", 2), tensors(tmp_path, 2)
    assert stored.keys() == read.keys()
    assert all(torch.equal(stored[name], read[name]) for name in stored)


def test_killed_while_and_after_a_checkpoint_is_written_ends_bit_identical() -> None:
    drill = HERE.parent / "drills" / "kill_resume.py"
    done = run(drill, "--task", "toy", "--kills", "2", "--at", "checkpoint", "committed")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["kills"] == 2
    assert summary["differing"] == 0


@given(st.lists(st.sampled_from(["--start", "--out", "runs/x", "a.b=1", "--no", "--fresh", "-h", "--node"])))
def test_arguments_reach_the_command_whatever_torchrun_calls_its_own(arguments: list[str]) -> None:
    command = launch_command(3, ["train", "config.yaml", *arguments])
    parsed = get_args_parser().parse_args(command[1:])
    assert (parsed.nproc_per_node, parsed.training_script, parsed.module) == ("3", "omniform.cli", True)
    assert parsed.training_script_args == ["train", "config.yaml", *arguments]


def test_launch_prints_what_it_would_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert launch(2, ["train", "digits", "name=a b"], dry_run=True) == 0
    assert capsys.readouterr().out == (
        "OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 "
        "-m -- omniform.cli train digits 'name=a b'\n"
    )


@pytest.mark.parametrize(("n", "arguments"), [(0, ["train", "digits"]), (2, []), (2, ["eval", "x"])])
def test_launch_refuses_what_it_cannot_run(n: int, arguments: list[str]) -> None:
    with pytest.raises(OmniformError, match="expected"):
        launch_command(n, arguments)
