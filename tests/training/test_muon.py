"""Muon behind the engine equals torch's Muon and AdamW side by side, and its state is stored like AdamW's."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniform.errors import OmniformError
from omniform.modeling.config import ConfigError, parse_config
from omniform.training.config import EngineConfig, FitConfig, OptimConfig
from omniform.training.engine import WEIGHTS, Engine
from omniform.training.optim import AveragingMuon, learning_rate
from omniform.training.step import train_step

OPTIM = OptimConfig(kind="muon", lr=0.05, warmup_steps=2, clip_grad_norm=0.5, ema_decay=0.8, momentum=0.9)
CONFIG = FitConfig(
    name="toy",
    steps=6,
    rows_per_step=8,
    optim=OPTIM,
    engine=EngineConfig(zero_stage=0, precision="fp32", micro_batch_rows=8),
)


def side_by_side(toy: ModuleType) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights and averages after training with two optimizers of torch."""
    task = toy.Toy(8, 8)
    module = task.module
    matrices = [
        layer.weight for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad
    ]
    others = [p for p in module.parameters() if p.requires_grad and all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, momentum=0.9, eps=OPTIM.eps, adjust_lr_fn="match_rms_adamw")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=OPTIM.betas, eps=OPTIM.eps)
    assert matrices
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    averages = {n: p.detach().clone() for n, p in trainable.items()}
    for step in range(CONFIG.steps):
        [batch] = task.micro_batches(step, 0, 1)
        losses = module(batch.inputs)
        total = sum(w * losses[t] / batch.counts[t] for t, w in task.term_weights.items() if batch.counts[t])
        module.zero_grad()
        total.backward()
        for p in trainable.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        nn.utils.clip_grad_norm_(trainable.values(), 0.5)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(OPTIM, step, CONFIG.steps)
        for p in matrices:
            if not p.grad.any():  # only decays: what differs from torch's Muon
                p.data *= 1 - 0.1 * learning_rate(OPTIM, step, CONFIG.steps)
                if p in muon.state:
                    muon.state[p]["momentum_buffer"] *= 0.9
                p.grad = None
        muon.step()
        adamw.step()
        for n, p in trainable.items():
            averages[n] = 0.8 * averages[n] + 0.2 * p.detach()
    return {n: p.detach() for n, p in module.named_parameters()}, averages


def advance(engine: Engine, task: Any, steps: range) -> None:
    for step in steps:
        batches = task.micro_batches(step, 0, 1)
        train_step(engine, task.term_weights, batches, learning_rate(OPTIM, step, CONFIG.steps))


def test_training_equals_two_optimizers_side_by_side(toy: ModuleType) -> None:
    weights, averages = side_by_side(toy)
    task = toy.Toy(8, 8)
    engine = Engine(task.module, CONFIG)
    advance(engine, task, range(CONFIG.steps))
    for name, value in engine.read(WEIGHTS):
        torch.testing.assert_close(value, weights[name], rtol=1e-5, atol=1e-6)
    for name, value in engine.read("ema"):
        torch.testing.assert_close(value, averages[name], rtol=1e-5, atol=1e-6)
    engine.close()


def test_state_that_is_written_back_goes_on_to_the_same_bits(toy: ModuleType) -> None:
    task = toy.Toy(8, 8)
    engine = Engine(task.module, CONFIG)
    advance(engine, task, range(3))
    keys = (WEIGHTS, *engine.state_keys)
    stored = {key: {name: value.clone() for name, value in engine.read(key)} for key in keys}
    n_updates = engine.n_updates
    advance(engine, task, range(3, CONFIG.steps))
    final = {name: value.clone() for name, value in engine.read(WEIGHTS)}
    engine.close()

    again = toy.Toy(8, 8)
    engine = Engine(again.module, copy.deepcopy(CONFIG))
    for key in keys:
        for name, value in stored[key].items():
            engine.write(name, value, key)
    engine.n_updates = n_updates
    advance(engine, again, range(3, CONFIG.steps))
    for name, value in engine.read(WEIGHTS):
        assert torch.equal(value, final[name]), name
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_without_whole_matrices_are_refused(stage: int) -> None:
    text = f"name: x\nsteps: 3\nengine: {{zero_stage: {stage}}}\noptim: {{kind: muon}}"
    with pytest.raises(ConfigError, match=f"optim.kind is muon at engine.zero_stage {stage}"):
        parse_config(FitConfig, text)


def test_a_matrix_without_gradient_decays_and_does_not_move_otherwise() -> None:
    torch.manual_seed(0)
    module = nn.ModuleList([nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)])
    optimizer = AveragingMuon(module, OptimConfig(kind="muon", lr=0.1, weight_decay=0.5, momentum=0.9))
    optimizer.initialise_state(module.parameters())
    used, idle = (layer.weight for layer in module)

    def step(*layers: nn.Module) -> None:
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        for layer in layers:
            layer(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()

    step(*module)
    momentum, before = optimizer.state[idle]["exp_avg"].clone(), idle.detach().clone()
    assert momentum.any()
    for n in range(1, 4):
        moved = used.detach().clone()
        step(module[0])
        assert not torch.allclose(used, moved * 0.95)
        torch.testing.assert_close(idle.detach(), before * 0.95**n)
        torch.testing.assert_close(optimizer.state[idle]["exp_avg"], momentum * 0.9**n)
    assert optimizer.n_updates == 4
    step(*module)
    assert not torch.allclose(idle, before * 0.95**4)


def test_a_module_without_linear_layers_is_refused() -> None:
    with pytest.raises(OmniformError, match=r"optim\.kind is muon, but Embedding has no linear layer"):
        AveragingMuon(nn.Embedding(3, 2), OptimConfig(kind="muon"))
