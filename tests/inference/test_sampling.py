"""Sampling functions equal transformers' processors, and draws follow the distribution they claim."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    ClassifierFreeGuidanceLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omniform.errors import OmniformError
from omniform.inference.sampling import (
    KeyedDraw,
    choose,
    keep_top_k,
    keep_top_p,
    sampling_settings,
    truncated_log_probs,
)
from omniform.kernels.keyed_noise import keyed_gumbel
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.next_token import NextToken

NO_IDS = torch.zeros(3, 0, dtype=torch.int64)


def random_logits(seed: int, width: int = 17) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=st.integers(0, 999), k=st.integers(1, 30))
def test_top_k_equals_transformers(seed: int, k: int) -> None:
    logits = random_logits(seed)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits))


@given(seed=st.integers(0, 999), p=st.floats(0.01, 1.0))
def test_top_p_equals_transformers(seed: int, p: float) -> None:
    logits = random_logits(seed)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_IDS, logits))


@given(seed=st.integers(0, 999), scale=st.floats(1.01, 9.0))
def test_guidance_equals_transformers(seed: int, scale: float) -> None:
    conditional, unconditional = random_logits(seed), random_logits(seed + 1000)
    theirs = ClassifierFreeGuidanceLogitsProcessor(scale)(NO_IDS, torch.cat([conditional, unconditional]))
    torch.testing.assert_close(NextToken().guide(conditional, unconditional, scale), theirs)


def test_guidance_scale_one_is_the_condition_alone() -> None:
    conditional, unconditional = random_logits(0), random_logits(1)
    torch.testing.assert_close(NextToken().guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(NextToken().guide(conditional, unconditional, 0.0), unconditional)


@given(seed=st.integers(0, 99), temperature=st.floats(0.1, 4.0), k=st.integers(1, 20), p=st.floats(0.05, 1.0))
def test_the_order_is_temperature_then_top_k_then_top_p(seed: int, temperature: float, k: int, p: float) -> None:
    logits = random_logits(seed)
    settings = SamplingSettings(temperature=temperature, top_k=k, top_p=p)
    theirs = TopPLogitsWarper(p)(
        NO_IDS, TopKLogitsWarper(k)(NO_IDS, TemperatureLogitsWarper(temperature)(NO_IDS, logits))
    )
    torch.testing.assert_close(truncated_log_probs(logits, settings), theirs.log_softmax(-1))


def test_draws_follow_the_distribution() -> None:
    n, logits = 20_000, torch.tensor([0.0, 1.0, 2.0, float("-inf")])
    noise = torch.from_numpy(keyed_gumbel(3, np.arange(n)[:, None], np.arange(4)[None, :]))
    drawn = choose(logits.log_softmax(-1).expand(n, 4), noise).bincount(minlength=4) / n
    expected = logits.softmax(-1)
    deviation = (expected * (1 - expected) / n).sqrt()
    assert drawn[3] == 0
    assert ((drawn - expected).abs() <= 4 * deviation).all()


@given(seed=st.integers(0, 2**63 - 1), keep=st.sets(st.integers(0, 7), min_size=1))
def test_a_draw_depends_on_its_position_and_not_on_the_others(seed: int, keep: set[int]) -> None:
    draw, logits = KeyedDraw(seed, 0, 1, SamplingSettings()), torch.randn(8, 11)
    positions = torch.tensor(sorted(keep))
    choice, log_probability = draw.tokens(logits, 2, torch.arange(8))
    some, some_log_probability = draw.tokens(logits[positions], 2, positions)
    assert torch.equal(some, choice[positions])
    torch.testing.assert_close(some_log_probability, log_probability[positions])
    assert torch.equal(draw.gumbel(2, positions), draw.gumbel(2, torch.arange(8))[positions])


def test_every_key_changes_the_draw() -> None:
    logits, positions = torch.zeros(64, 50), torch.arange(64)
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [
        KeyedDraw(seed, sample, span, SamplingSettings()).tokens(logits, step, positions)[0]
        for seed, sample, span, step in keys
    ]
    # Two independent draws of 64 tokens out of 50 agree in 1.3 places on average.
    assert all((drawn[0] == other).sum() < 10 for other in drawn[1:])
    assert not torch.equal(drawn[0][:32], drawn[0][32:])


def test_temperature_zero_takes_the_likeliest_whatever_the_seed() -> None:
    logits, positions = random_logits(5), torch.arange(3)
    for seed in range(5):
        draw = KeyedDraw(seed, 0, 0, SamplingSettings(temperature=0))
        assert torch.equal(draw.tokens(logits, 0, positions)[0], logits.argmax(-1))
        assert not draw.gumbel(0, positions).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("steps", 0),
        ("max_new_tokens", 0),
        ("guidance_scale", -0.5),
        ("warmth", 1),
    ],
)
def test_a_bad_setting_is_named_with_its_value(name: str, value: object) -> None:
    with pytest.raises(OmniformError, match=f"here: .*{name}") as caught:
        sampling_settings("here", **{name: value})
    assert "expected" in str(caught.value)
    assert name == "warmth" or repr(value) in str(caught.value)
