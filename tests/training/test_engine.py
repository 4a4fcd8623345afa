"""The engine at every ZeRO stage against a loop in plain torch, and its state as full tensors."""

import copy
from types import ModuleType

import pytest
import torch
from torch import nn

from omniform.errors import OmniformError
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import WEIGHTS, Engine
from omniform.training.optim import learning_rate
from omniform.training.step import train_step

STAGES = (0, 1, 2, 3)
OPTIM = OptimConfig(lr=0.05, warmup_steps=2, clip_grad_norm=0.5, ema_decay=0.8)


def settings(stage: int, precision: str = "fp32", steps: int = 6, micro_batch_rows: int = 4) -> FitConfig:
    engine = EngineConfig(zero_stage=stage, precision=precision, micro_batch_rows=micro_batch_rows)
    return FitConfig(name="toy", steps=steps, rows_per_step=8, optim=OPTIM, engine=engine)


def plain_training(task, config: FitConfig) -> tuple[dict, dict, list[float]]:
    """The oracle: one batch per step, each term's mean, torch's clipping and AdamW; weights, averages and norms."""
    module = copy.deepcopy(task.module)
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trainable.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trainable.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps)
    averages, norms = {n: p.detach().clone() for n, p in trainable.items()}, []
    for step in range(config.steps):
        [batch] = type(task)(8, 8).micro_batches(step, 0, 1)
        losses = module(batch.inputs)
        total = sum(w * losses[t] / batch.counts[t] for t, w in task.term_weights.items() if batch.counts[t])
        optimizer.zero_grad(set_to_none=False)
        total.backward()
        for p in trainable.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms.append(float(nn.utils.clip_grad_norm_(trainable.values(), OPTIM.clip_grad_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, config.steps)
        optimizer.step()
        for n, p in trainable.items():
            averages[n] = 0.8 * averages[n] + 0.2 * p.detach()
    return {n: p.detach() for n, p in module.named_parameters()}, averages, norms


@pytest.mark.parametrize("stage", STAGES)
def test_training_equals_plain_torch(toy: ModuleType, stage: int) -> None:
    config = settings(stage)
    weights, averages, norms = plain_training(toy.Toy(8, 4), config)
    task = toy.Toy(8, 4)
    engine = Engine(task.module, config)
    for step in range(config.steps):
        lr = learning_rate(OPTIM, step, config.steps)
        result = train_step(engine, task.term_weights, task.micro_batches(step, 0, 1), lr)
        assert result.update.grad_norm == pytest.approx(norms[step], rel=1e-5)
    # Same mathematics in another order of summation: rounding of fp32 over six steps.
    torch.testing.assert_close(dict(engine.read(WEIGHTS)), weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(engine.read("ema")), averages, rtol=1e-4, atol=1e-6)
    assert engine.n_updates == config.steps
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_state_set_before_the_first_step_is_read_back_and_trained_from(toy: ModuleType, stage: int) -> None:
    task = toy.Toy(8, 4)
    engine = Engine(task.module, settings(stage))
    torch.manual_seed(5)
    written = {
        key: {name: torch.rand(shape) for name, shape in engine.shapes(key).items()}
        for key in (WEIGHTS, *engine.state_keys)
    }
    for key, tensors in written.items():
        for name, value in tensors.items():
            engine.write(name, value, key)
    engine.n_updates = 17
    for key, tensors in written.items():
        read = dict(engine.read(key))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors), key
    assert "frozen" in written[WEIGHTS]
    assert "frozen" not in written["ema"]
    # The forward pass reads the weights that were set.
    [batch] = toy.Toy(8, 8).micro_batches(0, 0, 1)
    oracle = toy.ToyModule(0.0)
    oracle.load_state_dict(written[WEIGHTS] | {"n_forward": torch.zeros(())})
    for term, loss in oracle(batch.inputs).items():
        torch.testing.assert_close(engine.forward(batch.inputs)[term], loss)
    assert engine.n_updates == 17
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_step_with_nan_changes_nothing_and_the_next_one_is_sound(toy: ModuleType, stage: int) -> None:
    task = toy.Toy(8, 4, nan_steps=[1])
    engine = Engine(task.module, settings(stage))
    skipped = []
    for step in range(3):
        before = {key: dict(engine.read(key)) for key in (WEIGHTS, *engine.state_keys)}
        result = train_step(engine, task.term_weights, task.micro_batches(step, 0, 1), 0.1)
        after = {key: dict(engine.read(key)) for key in before}
        same = [torch.equal(before[key][n], after[key][n]) for key in before for n in before[key] if n != "frozen"]
        skipped.append(result.update.skipped)
        assert all(same) if result.update.skipped else not any(same)
        assert all(torch.isfinite(t).all() for tensors in after.values() for t in tensors.values())
    assert skipped == [False, True, False]
    assert engine.n_updates == 2
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters_exactly(toy: ModuleType, stage: int) -> None:
    task = toy.Toy(8, 4)
    engine = Engine(task.module, settings(stage, "bf16"))
    third = torch.full((7, 5), 1 / 3)  # not a bf16 number
    engine.write("trunk.0.weight", third)
    assert torch.equal(dict(engine.read(WEIGHTS))["trunk.0.weight"], third)
    result = train_step(engine, task.term_weights, task.micro_batches(0, 0, 1), 1e-6)
    moved = dict(engine.read(WEIGHTS))["trunk.0.weight"]
    # AdamW's first step is lr in size, far below a bf16 ulp of 1/3: only a master copy can hold it.
    assert not result.update.skipped
    assert 0 < float((moved - third).abs().max()) < 2e-6
    engine.close()


def test_autocast_multiplies_in_bf16_and_keeps_fp32_weights(toy: ModuleType) -> None:
    task = toy.Toy(8, 4)
    engine = Engine(task.module, settings(2, "bf16_autocast"))
    seen = []
    task.module.trunk[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train_step(engine, task.term_weights, task.micro_batches(0, 0, 1), 0.1)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in task.module.parameters())
    engine.close()


def test_rows_are_split_over_processes_evenly_and_over_passes_as_they_fit() -> None:
    config = FitConfig(name="toy", steps=1, rows_per_step=10, engine=EngineConfig(micro_batch_rows=4))
    assert [config.accumulation(world_size) for world_size in (1, 2, 5, 10)] == [3, 2, 1, 1]
    with pytest.raises(OmniformError, match="rows_per_step is 10, expected a multiple of the number of processes, 3"):
        config.accumulation(3)


def test_uneven_micro_batches_give_the_step_of_the_whole_batch(toy: ModuleType) -> None:
    weights = []
    for micro_batch_rows in (8, 3):
        config = settings(2, micro_batch_rows=micro_batch_rows)
        task = toy.Toy(8, micro_batch_rows)
        engine = Engine(task.module, config)
        for step in range(3):
            train_step(engine, task.term_weights, task.micro_batches(step, 0, 1), 0.1)
        weights.append(dict(engine.read(WEIGHTS)))
        engine.close()
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


def test_bf16_at_stage_0_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is bf16 at zero_stage 0"):
        EngineConfig(zero_stage=0, precision="bf16")
