import math
import re
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from omniform.modeling.config import ConfigError, parse_config
from omniform.training.config import FitConfig, OptimConfig, StageConfig
from omniform.training.optim import AveragingAdamW, learning_rate, learning_rate_at


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


def fit_config(stages: list[dict], **optim: object) -> FitConfig:
    steps = sum(stage["steps"] for stage in stages)
    return parse_config(FitConfig, yaml.safe_dump({"name": "x", "steps": steps, "optim": optim, "stages": stages}))


def test_a_decay_of_the_run_comes_once_whatever_its_stages() -> None:
    stages = [{"name": "a", "steps": 30}, {"name": "b", "steps": 50}, {"name": "c", "steps": 20}]
    config = fit_config(stages, lr=0.3, schedule="wsd", warmup_steps=10, decay_fraction=0.4, final_lr_fraction=0.1)
    rates = [learning_rate_at(config, step) for step in range(100)]
    rise, flat = [0.03 * (step + 1) for step in range(10)], [0.3] * 50
    assert rates == pytest.approx(rise + flat + [0.3 * (1 - 0.9 * k / 40) for k in range(40)])
    assert rates == [learning_rate(config.optim, step, 100) for step in range(100)]


def test_a_stage_with_a_schedule_of_its_own_has_it_over_its_own_steps() -> None:
    stages = [
        {"name": "flat", "steps": 30, "learning_rate": {"lr": 0.2, "schedule": "constant", "warmup_steps": 5}},
        {"name": "as-the-run", "steps": 30},
        {"name": "again", "steps": 40, "learning_rate": {"lr": 0.1, "schedule": "wsd", "decay_fraction": 0.5}},
    ]
    config = fit_config(stages, lr=0.3, schedule="cosine", final_lr_fraction=0.0)
    rates = [learning_rate_at(config, step) for step in range(100)]
    assert rates[:30] == pytest.approx([0.04, 0.08, 0.12, 0.16, *[0.2] * 26])
    assert rates[30:60] == pytest.approx([0.15 * (1 + math.cos(math.pi * step / 100)) for step in range(30, 60)])
    assert rates[60:] == pytest.approx([0.1] * 20 + [0.1 * (1 - k / 20) for k in range(20)])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_every_step_belongs_to_one_stage(lengths: list[int]) -> None:
    stages = [{"name": f"s{n}", "steps": steps} for n, steps in enumerate(lengths)]
    config = fit_config(stages)
    expected = [place for place, steps in enumerate(lengths) for _ in range(steps)]
    assert [config.stage_at(step) for step in range(config.steps)] == expected
    assert [config.stage_steps(place) for place in range(len(lengths))] == lengths
    last_open = replace(config, stages=(*config.stages[:-1], StageConfig(name="last")))
    assert [last_open.stage_at(step) for step in range(config.steps)] == expected


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{name: a, steps: 0}]", r"stages\.0\.steps: .*greater than or equal to 1"),
        ("[{name: a, steps: 6}, {name: b}]", r"stages\.1\.steps: no steps are left for b.* 6 of steps = 6"),
        ("[{name: a, steps: 2}, {name: b, steps: 3}]", r"stages take 5 steps in all, expected steps = 6"),
        ("[{name: a}, {name: b, steps: 3}]", r"stages\.0\.steps: required"),
        ("[{name: a, steps: 2}, {name: a}]", r"stages\.1\.name is 'a'"),
        ("[{name: a b}]", r"stages\.0\.name: .*pattern"),
        ("[{name: a, stpes: 2}]", r"stages\.0\.stpes: unknown key; did you mean steps"),
        ("[{name: a, loss_weights: {value: -1}}]", r"stages\.0\.loss_weights\.value: .*greater than"),
        ("[{name: a, learning_rate: {lr: 0}}]", r"stages\.0\.learning_rate\.lr: .*greater than 0"),
        (
            "[{name: a, steps: 2, learning_rate: {warmup_steps: 2}}, {name: b}]",
            r"stages\.0\.learning_rate\.warmup_steps is 2, expected fewer than the stage's steps = 2",
        ),
    ],
)
def test_a_bad_stage_is_refused_with_its_path(stages: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(FitConfig, f"name: x\nsteps: 6\nstages: {stages}")


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


def test_all_that_a_short_run_breaks_is_said_at_once_and_what_it_advises_works() -> None:
    text = "name: x\nsteps: 500\nstages: [{name: a, steps: 200}, {name: b}]\noptim: {warmup_steps: 30}"
    with pytest.raises(ConfigError) as caught:
        parse_config(FitConfig, text, ["steps=10"])
    advised = re.findall(r"such as (\S+=\d+)", str(caught.value))
    assert len(str(caught.value).splitlines()) == 3
    assert len(advised) == 2
    assert parse_config(FitConfig, text, ["steps=10", *advised]).steps == 10
