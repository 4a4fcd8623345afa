import json
import os
import random
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omniform.errors import OmniformError
from omniform.training import random_state
from omniform.training.loop import StopSignals
from omniform.training.metrics import truncate_log
from omniform.training.run_folder import RunFolderError, resume_command

FAST = {"optim": {"lr": 0.05, "ema_decay": 0.8}, "checkpoint": {"every": 2}, "log": {"every": 2}}


def final(out: Path, step: int = 6) -> dict[str, bytes]:
    folders = (out / "checkpoints" / f"step-{step}", out / "model")
    return {p.name: p.read_bytes() for folder in folders for p in folder.iterdir()}


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    pass


def interrupt_at(step: int):
    """A preview that ends the run from inside, as a crash would."""

    def preview(module: torch.nn.Module, now: int) -> None:
        if now == step:
            raise Interrupted

    return preview


@pytest.mark.parametrize("stage", range(4))
def test_interrupted_run_ends_bit_identical(toy: ModuleType, tmp_path: Path, stage: int) -> None:
    settings = FAST | {"engine": {"zero_stage": stage, "micro_batch_rows": 4}, "toy": {"dropout": 0.3}}
    settings["log"] = {"every": 2, "samples_every": 1}
    toy.run_toy(tmp_path / "never", preview=lambda module, step: None, **settings)
    with pytest.raises(Interrupted):
        toy.run_toy(tmp_path / "stopped", preview=interrupt_at(3), **settings)
    task = toy.run_toy(tmp_path / "stopped", preview=lambda module, step: None, **settings)
    assert task.restored == {"step": 2}
    assert final(tmp_path / "stopped") == final(tmp_path / "never")
    timeless = [
        [{k: v for k, v in entry.items() if k in ("step", "loss", "lr", "grad_norm")} for entry in log(tmp_path / name)]
        for name in ("stopped", "never")
    ]
    assert timeless[0] == timeless[1]
    assert [entry["step"] for entry in timeless[0]] == [2, 4, 6]


STAGED = FAST | {
    "stages": [
        {"name": "first", "steps": 3, "learning_rate": {"lr": 0.05, "schedule": "constant", "warmup_steps": 2}},
        {"name": "second", "loss_weights": {"label": 2.0}},
    ],
}


@pytest.mark.parametrize(("stage", "crash"), [(0, 3), (1, 3), (2, 2), (2, 3), (2, 4), (3, 3)])
def test_a_run_of_stages_interrupted_before_at_or_after_the_hand_off_ends_bit_identical(
    toy: ModuleType, tmp_path: Path, stage: int, crash: int
) -> None:
    settings = STAGED | {"engine": {"zero_stage": stage, "micro_batch_rows": 4}, "toy": {"dropout": 0.3}}
    settings |= {"log": {"every": 2, "samples_every": 1}, "checkpoint": {"every": 1}}
    toy.run_toy(tmp_path / "never", **settings)
    with pytest.raises(Interrupted):
        toy.run_toy(tmp_path / "stopped", preview=interrupt_at(crash), **settings)
    task = toy.run_toy(tmp_path / "stopped", **settings)
    assert task.restored == {"step": crash}
    assert final(tmp_path / "stopped") == final(tmp_path / "never")


def test_stages_that_change_nothing_change_no_bit(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path / "plain", **FAST)
    stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 3}, {"name": "c"}]
    toy.run_toy(tmp_path / "staged", **FAST, stages=stages)
    assert final(tmp_path / "staged") == final(tmp_path / "plain")
    assert [(entry["step"], entry["stage"]) for entry in log(tmp_path / "staged")] == [
        *((1, "a"), (2, "b"), (4, "b"), (6, "c"))
    ]
    assert not any("stage" in entry for entry in log(tmp_path / "plain"))


def test_weights_and_average_go_on_where_the_stage_before_left_them(toy: ModuleType, tmp_path: Path) -> None:
    whole = STAGED | {"checkpoint": {"every": 3}}
    toy.run_toy(tmp_path / "whole", **whole)
    # The first stage alone is a run of three steps with its schedule.
    alone = FAST | {"steps": 3, "optim": {**STAGED["stages"][0]["learning_rate"], "ema_decay": 0.8}}
    toy.run_toy(tmp_path / "alone", **alone)
    for name in ("weights", "ema", "optimizer"):
        file = Path("checkpoints", "step-3", f"{name}.safetensors")
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_a_stage_weighs_losses_its_own_way(toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.run_toy(tmp_path, **STAGED | {"log": {"every": 1}})
    assert re.findall(r"^step (\d)/6  (\w+)  loss", capsys.readouterr().err, flags=re.MULTILINE) == [
        (str(step), "first" if step <= 3 else "second") for step in range(1, 7)
    ]
    for entry in log(tmp_path):
        weight = 0.5 if entry["step"] <= 3 else 2.0
        expected = entry["loss/value"] + weight * entry.get("loss/label", 0.0)
        assert entry["loss"] == pytest.approx(expected)
        assert entry["weight/value"] == 1
        assert entry.get("weight/label", weight) == weight
    with pytest.raises(OmniformError, match=r"stages\.0\.loss_weights\.image: no such loss term.*value, label"):
        toy.run_toy(tmp_path / "bad", **FAST, stages=[{"name": "a", "loss_weights": {"image": 1.0}}])
    with pytest.raises(OmniformError, match=r"stages\.0\.loss_weights: every loss has the weight 0"):
        toy.run_toy(tmp_path / "bad", **FAST, stages=[{"name": "a", "loss_weights": {"value": 0.0, "label": 0.0}}])


def test_samples_leave_no_trace_in_the_run(toy: ModuleType, tmp_path: Path) -> None:
    settings = FAST | {"toy": {"dropout": 0.3}}
    toy.run_toy(tmp_path / "without", **settings)
    seen = []

    def preview(module: torch.nn.Module, step: int) -> None:
        seen.append(step)
        assert not module.training
        torch.rand(3)
        np.random.rand(3)
        random.random()

    toy.run_toy(tmp_path / "with", preview=preview, **settings | {"log": {"every": 2, "samples_every": 4}})
    assert seen == [4, 6]  # the last step, too
    assert final(tmp_path / "without") == final(tmp_path / "with")


def test_result_and_samples_hold_the_average(toy: ModuleType, tmp_path: Path) -> None:
    snapshots = []
    settings = FAST | {"log": {"every": 2, "samples_every": 6}}
    toy.run_toy(tmp_path, preview=lambda m, step: snapshots.append(m.state_dict()), **settings)
    result = load_file(tmp_path / "model" / "toy.safetensors")
    average = load_file(tmp_path / "checkpoints" / "step-6" / "ema.safetensors")
    weights = load_file(tmp_path / "checkpoints" / "step-6" / "weights.safetensors")
    for name, value in average.items():
        assert torch.equal(result[name], value)
        assert torch.equal(snapshots[0][name], value)
        assert not torch.equal(weights[name], value)
    assert torch.equal(result["frozen"], weights["frozen"])
    assert int(result["n_forward"]) == 6


def test_finished_run_is_left_alone(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path, **FAST)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()}
    toy.run_toy(tmp_path, **FAST)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "model").iterdir()} == before


def test_a_run_stopped_while_its_result_is_written_writes_it_whole(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self, folder: Path, module: torch.nn.Module) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(toy.Toy, "save", broken)
        with pytest.raises(Interrupted):
            toy.run_toy(tmp_path, **FAST)
    assert not (tmp_path / "model").exists()
    toy.run_toy(tmp_path, **FAST)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["toy.safetensors"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_writes_a_checkpoint_and_exits_with_its_status(
    toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    settings = FAST | {"checkpoint": {"every": 100}, "log": {"every": 2, "samples_every": 1}, "toy": {"dropout": 0.3}}

    def preview(module: torch.nn.Module, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stopped:
        toy.run_toy(tmp_path / "stopped", preview=preview, **settings)
    assert stopped.value.code == 128 + number
    message = capsys.readouterr().err
    assert f"stopped by {number.name} after step 3" in message
    assert resume_command() in message
    toy.run_toy(tmp_path / "stopped", **settings)
    toy.run_toy(tmp_path / "never", **settings)
    assert final(tmp_path / "stopped") == final(tmp_path / "never")


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_second_sigint_ends_at_once() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_changed_config_is_refused_with_a_diff(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path, **FAST)
    with pytest.raises(RunFolderError, match=r"(?s)-\s+lr: 0.05.*\+\s+lr: 0.06.*--fresh"):
        toy.run_toy(tmp_path, **FAST | {"optim": {"lr": 0.06, "ema_decay": 0.8}})
    # What does not change the training may differ.
    toy.run_toy(tmp_path, **FAST | {"log": {"every": 3}, "engine": {"zero_stage": 3}, "checkpoint": {"every": 5}})


def test_fresh_starts_over(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path / "one", **FAST)
    (tmp_path / "one" / "notes.txt").write_text("mine")
    changed = FAST | {"optim": {"lr": 0.06, "ema_decay": 0.8}}
    toy.run_toy(tmp_path / "one", fresh=True, **changed)
    toy.run_toy(tmp_path / "two", **changed)
    assert final(tmp_path / "one") == final(tmp_path / "two")
    assert (tmp_path / "one" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "checkpoints", "samples"])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_holds_no_run_is_left_alone(toy: ModuleType, tmp_path: Path, name: str, fresh: bool) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=f"holds {name}, but no config.yaml of a run.*another --out"):
        toy.run_toy(tmp_path, fresh=fresh, **FAST)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["notes.txt"]


def test_a_configuration_alone_does_not_stand_in_the_way_of_another(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path / "one", **FAST)
    (tmp_path / "two").mkdir()
    before = (tmp_path / "one" / "config.yaml").read_text()
    (tmp_path / "two" / "config.yaml").write_text(before.replace("seed: 0", "seed: 7"))  # of a run that never began
    assert before != (tmp_path / "two" / "config.yaml").read_text()
    toy.run_toy(tmp_path / "two", **FAST)
    assert final(tmp_path / "one") == final(tmp_path / "two")


def test_run_that_only_fails_stops_with_its_budget(toy: ModuleType, tmp_path: Path) -> None:
    settings = {"optim": {"skip_limit": 3}, "toy": {"nan_steps": [1, 2, 3, 4]}}
    with pytest.raises(OmniformError, match="not finite in 3 steps in a row, up to step 4"):
        toy.run_toy(tmp_path, **settings)


def test_skipped_steps_are_counted_and_left_out_of_the_losses(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path, toy={"nan_steps": [1, 4]}, log={"every": 2})
    entries = log(tmp_path)
    assert [entry["skipped"] for entry in entries] == [1, 1, 2]
    assert all(np.isfinite(entry["loss/value"]) for entry in entries)
    assert entries[0]["grad_norm"] is None


def test_logged_loss_is_the_mean_per_item(toy: ModuleType, tmp_path: Path) -> None:
    toy.run_toy(tmp_path, log={"every": 1}, steps=1, engine={"precision": "fp32"})
    [batch] = toy.Toy(8, 8).micro_batches(0, 0, 1)
    losses = toy.Toy(8, 8).module(batch.inputs)
    [entry] = log(tmp_path)
    for term, loss in losses.items():
        assert entry[f"loss/{term}"] == pytest.approx(float(loss.detach()) / batch.counts[term], rel=1e-6)
        assert entry[f"count/{term}"] == batch.counts[term]
    assert entry["loss"] == pytest.approx(entry["loss/value"] + 0.5 * entry["loss/label"])


def test_progress_is_a_line_per_window_or_a_bar_on_a_terminal(
    toy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.run_toy(tmp_path / "plain", **FAST)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/6", "4/6", "6/6"]
    assert all(re.search(r"loss \d.* grad_norm .* lr .* tokens/s  eta 0:00:\d\d$", line) for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    toy.run_toy(tmp_path / "bar", **FAST)
    bar = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"100%.* 6/6 \[\d\d:\d\d<.*loss \d.*tokens/s\]$", bar)  # done, time taken < time left


def test_tensorboard_shows_what_the_log_says(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        toy.run_toy(tmp_path, preview=interrupt_at(4), **FAST | {"log": {"every": 1, "samples_every": 4}})
    toy.run_toy(tmp_path, **FAST | {"log": {"every": 1}})
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "loss/value", "lr", "grad_norm"):
        points = {event.step: event.value for event in shown.Scalars(key)}
        assert points == pytest.approx({entry["step"]: entry[key] for entry in log(tmp_path)}, rel=1e-6)


def test_log_cut_short_by_a_crash_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_random_state_round_trips_through_json() -> None:
    random_state.seed_everything(3, 1)
    torch.rand(5), np.random.randn(1), random.gauss(0, 1)
    state = json.loads(json.dumps(random_state.capture()))
    drawn = torch.rand(3), np.random.randn(3), random.gauss(0, 1)
    random_state.restore(state)
    again = torch.rand(3), np.random.randn(3), random.gauss(0, 1)
    assert torch.equal(drawn[0], again[0])
    assert np.array_equal(drawn[1], again[1])
    assert drawn[2] == again[2]


def test_resume_command_drops_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/x/bin/python", "/x/bin/omniform", "train", "digits", "--fresh", "steps=5"])
    assert resume_command() == "omniform train digits steps=5"
    monkeypatch.setenv("OMNIFORM_COMMAND", "omniform launch --nproc 2 -- train digits --fresh")
    assert resume_command() == "omniform launch --nproc 2 -- train digits"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradient_norms_of_terms_add_up_and_change_nothing(toy: ModuleType, tmp_path: Path, stage: int) -> None:
    settings = FAST | {"engine": {"zero_stage": stage, "micro_batch_rows": 3, "precision": "fp32"}}
    settings |= {"optim": {**settings.get("optim", {}), "clip_grad_norm": None}}
    for name, measured in (("plain", False), ("measured", True)):
        toy.run_toy(tmp_path / name, **settings | {"log": {"every": 1, "gradient_norms": measured}})
    assert final(tmp_path / "measured") == final(tmp_path / "plain")
    assert not any("grad_norm/value" in entry for entry in log(tmp_path / "plain"))
    for entry in log(tmp_path / "measured"):
        value, label, both = (entry[f"grad_norm{term}"] for term in ("/value", "/label", ""))
        if entry["step"] % 2 == 0:  # counted from 1: no row of such a step has a label
            assert label == 0
            assert value == pytest.approx(both, rel=1e-5)
        else:
            assert abs(value - label) < both < value + label


def test_gradient_norms_need_whole_gradients(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_norms is true at engine.zero_stage 3.*choose a lower stage"):
        toy.run_toy(tmp_path, engine={"zero_stage": 3}, log={"gradient_norms": True})
