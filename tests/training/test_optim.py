import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from omniform.training.config import OptimConfig
from omniform.training.optim import AveragingAdamW, learning_rate


@given(st.integers(1, 500), st.data())
def test_cosine_follows_its_closed_form(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    final = data.draw(st.floats(0, 1))
    config = OptimConfig(lr=0.3, schedule="cosine", warmup_steps=warmup, final_lr_fraction=final)
    for step in {0, warmup // 2, warmup, (warmup + steps) // 2, steps - 1} - {steps}:
        if step < warmup:
            expected = 0.3 * (step + 1) / warmup
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            expected = 0.3 * final + 0.3 * (1 - final) * math.cos(angle / 2) ** 2  # (1 + cos a) / 2 = cos^2(a / 2)
        assert learning_rate(config, step, steps) == pytest.approx(expected)


@given(st.integers(2, 500), st.data())
def test_wsd_is_constant_then_falls_linearly_to_the_final_rate(steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps // 2))
    fraction = data.draw(st.floats(0.05, 0.5))
    config = OptimConfig(lr=0.3, schedule="wsd", warmup_steps=warmup, decay_fraction=fraction, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    decay = max(1, round(fraction * steps))
    assert rates[warmup : steps - decay] == pytest.approx([0.3] * (steps - decay - warmup))
    # One step past the end would be at the final rate exactly.
    assert rates[-1] == pytest.approx(0.3 * (0.1 + 0.9 / decay))
    falls = [a - b for a, b in zip(rates[steps - decay :], rates[steps - decay + 1 :], strict=False)]
    assert falls == pytest.approx([0.3 * 0.9 / decay] * len(falls))


def test_schedule_never_exceeds_the_peak_and_reaches_it_with_the_last_warmup_step() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert max(rates) == 2.0


def test_update_equals_adamw_and_average_its_definition() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.1, weight_decay=0.5, ema_decay=0.75)
    optimizer = AveragingAdamW(ours, config)
    optimizer.initialise_state(ours.parameters())
    # torch's own AdamW, with decay on the matrix and none on the bias
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.5}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1,
        betas=config.betas,
        fused=True,
    )
    average = theirs.weight.detach().clone()
    for _ in range(5):
        x = torch.randn(4, 3)
        for module, optimizer_ in ((ours, optimizer), (theirs, reference)):
            module.zero_grad()
            module(x).square().sum().backward()
            optimizer_.step()
        average = 0.75 * average + 0.25 * theirs.weight.detach()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    torch.testing.assert_close(optimizer.state[ours.weight]["ema"], average)
    assert optimizer.n_updates == 5


def test_average_of_constant_weights_is_the_weights_from_the_first_step() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    optimizer = AveragingAdamW(module, OptimConfig(ema_decay=0.999, weight_decay=0))
    optimizer.initialise_state(module.parameters())
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[module.weight]["ema"], before)
