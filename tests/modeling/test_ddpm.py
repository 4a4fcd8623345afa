"""Denoising diffusion: the chain is that of diffusers, and a perfect model walks it back."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from strategies import vector_spans

from omniform.inference.sampling import KeyedDraw
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.ddpm import N_TIMES, Ddpm

MASK = 999


def test_values_are_noised_as_by_diffusers() -> None:
    targets = vector_spans([3, 1, 4] * 50)
    found = Ddpm().corrupt(targets, MASK)
    assert targets.values is not None
    assert found.times is not None
    assert found.labels is not None
    theirs = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    times = (found.times * N_TIMES).round().long()
    torch.testing.assert_close(found.values, theirs.add_noise(targets.values, found.labels, times))
    of_spans = times.numpy()[np.unique(targets.span_index, return_index=True)[1]]
    assert len(set(of_spans.tolist())) > 100  # of 150
    assert (times.numpy() == of_spans[targets.span_index]).all()


def test_what_is_kept_of_data_follows_the_cosine() -> None:
    targets = vector_spans([1] * 2000)
    found = Ddpm().corrupt(targets, MASK)
    assert targets.values is not None
    assert found.times is not None
    assert found.values is not None
    assert found.labels is not None
    # arXiv:2102.09672, equation 17.
    kept = torch.cos((found.times + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    expected = kept[:, None] * targets.values + (1 - kept**2).clamp(min=0).sqrt()[:, None] * found.labels
    early = found.times < 0.9  # the chain bounds what its last steps take away
    torch.testing.assert_close(found.values[early], expected[early], atol=0.02, rtol=0.02)


@given(st.integers(1, 60), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 5), st.integers(0, 2**31))
def test_a_perfect_model_recovers_the_span_in_any_number_of_steps(
    steps: int, eta: float, length: int, seed: int
) -> None:
    truth = torch.randn(length, 3, generator=torch.Generator().manual_seed(seed))
    objective = Ddpm(eta=eta)
    draw = KeyedDraw(seed, 0, 0, SamplingSettings())
    state = objective.begin(length, steps, MASK)
    assert state.n_steps == pytest.approx(steps, rel=0.1, abs=1)
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    while not state.done:
        seen = objective.vectors(state, 3, draw)
        kept = alphas[round(float(seen.times[0]) * N_TIMES)]
        noise = (seen.values - kept.sqrt() * truth) / (1 - kept).sqrt()
        state = objective.step(state, noise, 0, None, MASK, draw)
    assert state.values is not None
    torch.testing.assert_close(state.values, truth, atol=2e-3, rtol=2e-3)


def test_only_the_noise_to_begin_with_decides_without_eta() -> None:
    for eta, same in ((0.0, True), (1.0, False)):
        objective, found = Ddpm(eta=eta, steps=4), []
        for seed in (1, 2):
            first, later = KeyedDraw(1, 0, 0, SamplingSettings()), KeyedDraw(seed, 0, 0, SamplingSettings())
            state = objective.begin(2, None, MASK)
            for draw in (first, later, later, later):
                state = objective.step(state, torch.full((2, 3), 0.1), 0, None, MASK, draw)
            found.append(state.values)
        assert torch.equal(*found) == same


@pytest.mark.parametrize("steps", [16, 50, 250])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_best_denoiser_of_a_gaussian_draws_that_gaussian(eta: float, steps: int) -> None:
    mean, sigma, n = 0.7, 0.5, 4000
    objective, draw = Ddpm(eta=eta), KeyedDraw(0, 0, 0, SamplingSettings())
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    state = objective.begin(n, steps, MASK)
    while not state.done:
        seen = objective.vectors(state, 1, draw)
        kept = alphas[round(float(seen.times[0]) * N_TIMES)]
        # E[noise | x_t] of data N(mean, sigma^2).
        spread = kept * sigma**2 + 1 - kept
        noise = (1 - kept).sqrt() * (seen.values - kept.sqrt() * mean) / spread
        state = objective.step(state, noise, 0, None, MASK, draw)
    assert state.values is not None
    assert float(state.values.mean()) == pytest.approx(mean, abs=0.05)
    assert float(state.values.std()) == pytest.approx(sigma, rel=max(0.03, 3 / steps))


@pytest.mark.parametrize("settings", [{"eta": 1.1}, {"steps": 0}, {"steps": 251}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Ddpm(**settings)  # type: ignore[arg-type]
