"""Mixtures of Gaussians over vectors: densities are those of torch, and what a perfect model knows comes back."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from strategies import vector_spans
from torch import distributions

from omniform.inference.sampling import KeyedDraw
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.gmm import Gmm, MixtureObjective
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.masked_gmm import MaskedGmm
from omniform.modeling.objectives.mixture import GUIDANCE_DRAWS, Mixture, guided_sample, n_parameters

MASK = 999


def outputs(rows: int, components: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, n_parameters(channels, components), generator=generator)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_log_density_is_that_of_torch(components: int, channels: int, seed: int) -> None:
    mixture = Mixture.of(outputs(6, components, channels, seed), components, 1e-3)
    values = torch.randn(6, channels, generator=torch.Generator().manual_seed(seed + 1))
    theirs = distributions.MixtureSameFamily(
        distributions.Categorical(logits=mixture.log_weights),
        distributions.Independent(distributions.Normal(mixture.means, mixture.scales), 1),
    )
    torch.testing.assert_close(mixture.log_density(values), theirs.log_prob(values), atol=1e-4, rtol=1e-4)


def test_scales_are_positive_smooth_and_bounded_below() -> None:
    raw = torch.tensor([-1e30, -1e4, -3.0, 0.0, 3.0, 1e4])
    found = Mixture.of(torch.stack([0 * raw, 0 * raw, raw], dim=-1), 1, 1e-6).scales.flatten()
    # (x + sqrt(x^2 + 4)) / 2 is exp(arsinh(x / 2)).
    expected = np.exp(np.arcsinh(raw.double().numpy() / 2)) + 1e-6
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5)
    raw.requires_grad_()
    Mixture.of(torch.stack([0 * raw, 0 * raw, raw], dim=-1), 1, 1e-6).scales.sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


@given(st.integers(1, 4), st.integers(1, 3))
def test_the_loss_is_the_negative_log_density_per_number_and_stays_finite(components: int, channels: int) -> None:
    objective = Gmm(components=components)
    given_outputs = outputs(4, components, channels).requires_grad_()
    labels = torch.tensor([0.0, 1.0, -1e6, 1e6])[:, None].repeat(1, channels)
    weights = torch.tensor([1.0, 2.0, 1.0, 0.0])
    loss = objective.loss(given_outputs, labels, weights)
    density = Mixture.of(given_outputs, components, objective.min_scale).log_density(labels)
    torch.testing.assert_close(loss, -(weights * density).sum() / channels)
    loss.backward()
    assert given_outputs.grad is not None
    assert given_outputs.grad.isfinite().all()
    assert not given_outputs.grad[3].any()


def perfect(truth: torch.Tensor, components: int) -> torch.Tensor:
    """Outputs of a model that is sure of the truth, in one of its components."""
    rows, channels = truth.shape
    logits, means = torch.full((rows, components), -30.0), torch.full((rows, components, channels), 9.0)
    logits[:, -1], means[:, -1] = 30.0, truth
    return torch.cat([logits, means.flatten(1), torch.full((rows, components * channels), -1e4)], dim=-1)


@pytest.mark.parametrize("objective", [Gmm(components=3), MaskedGmm(components=3), MaskedGmm(choice_temperature=0)])
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**31), st.sampled_from([0.0, 1.0]), st.booleans())
def test_a_perfect_model_recovers_the_span(
    objective: Any, length: int, steps: int, seed: int, temperature: float, guided: bool
) -> None:
    truth = torch.randn(length, 2, generator=torch.Generator().manual_seed(seed))
    settings = SamplingSettings(temperature=temperature, guidance_scale=2.0 if guided else 1.0)
    draw = KeyedDraw(seed, 0, 0, settings)
    state = objective.begin(length, steps, MASK)
    n_known = [0]
    while not state.done:
        seen = objective.vectors(state, 2, draw)
        rows = objective.inputs(state, 7)
        if seen is not None and objective.commits:
            assert torch.equal(seen.values, state.values[-1:])
        elif seen is not None:
            torch.testing.assert_close(seen.values, truth[seen.rows], atol=0.2, rtol=0.0)
        here = truth[state.step : state.step + 1] if objective.commits else truth
        assert len(rows) == len(here)
        made = perfect(here, objective.components)
        state = objective.step(state, objective.guide(made, made, 2.0) if guided else made, 0, None, MASK, draw)
        n_known.append(len(state.values) if objective.commits else int(state.known.sum()))
    assert n_known == sorted(set(n_known))
    assert len(n_known) == 1 + (length if objective.commits else min(steps, length))
    torch.testing.assert_close(state.values, truth, atol=0.2, rtol=0.0)  # some standard deviations of 0.01


def test_samples_have_the_distribution_of_the_mixture_and_temperature_scales_it() -> None:
    n = 4000
    mixture = Mixture(
        torch.tensor([0.3, 0.7]).log().repeat(n, 1),
        torch.tensor([[-2.0], [1.0]]).repeat(n, 1, 1),
        torch.tensor([[0.5], [0.25]]).repeat(n, 1, 1),
    )
    values = mixture.sample(0, torch.arange(n), KeyedDraw(1, 0, 0, SamplingSettings()))[:, 0].double().numpy()
    cdf = lambda x: 0.3 * stats.norm(-2, 0.5).cdf(x) + 0.7 * stats.norm(1, 0.25).cdf(x)  # noqa: E731
    assert stats.kstest(values, cdf).pvalue > 0.01
    calm = mixture.sample(0, torch.arange(n), KeyedDraw(1, 0, 0, SamplingSettings(temperature=0)))
    assert calm.eq(1.0).all()
    alone = Mixture(mixture.log_weights[:, :1] * 0, mixture.means[:, :1], mixture.scales[:, :1])
    half = alone.sample(0, torch.arange(n), KeyedDraw(1, 0, 0, SamplingSettings(temperature=0.5)))[:, 0].numpy()
    assert stats.kstest(half, stats.norm(-2, 0.25).cdf).pvalue > 0.01


@pytest.mark.parametrize(("scale", "channels"), [(1.5, 1), (2.0, 1), (3.0, 1), (2.0, 8), (3.0, 8), (2.0, 32)])
def test_guidance_between_two_gaussians_of_one_width_moves_the_mean(scale: float, channels: int) -> None:
    """p0 * (p1 / p0) ** s of N(m0, v) and N(m1, v) is N(m0 + s (m1 - m0), v)."""
    n, m0, m1, sigma = 3000, 0.0, 0.5 / channels, 0.8
    one, other = (
        Mixture(torch.zeros(n, 1), torch.full((n, 1, channels), mean), torch.full((n, 1, channels), sigma))
        for mean in (m1, m0)
    )
    draw = KeyedDraw(5, 0, 0, SamplingSettings(guidance_scale=scale))
    values = guided_sample(one, other, scale, 0, torch.arange(n), draw).double().numpy()
    expected = m0 + scale * (m1 - m0)
    # The largest of GUIDANCE_DRAWS ratios stands for the bound: nearly, not quite, the density.
    assert values.mean() == pytest.approx(expected, abs=0.06)
    assert values.std() == pytest.approx(sigma, rel=0.06)
    assert GUIDANCE_DRAWS == 64


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_masked_vectors_are_hidden_as_masked_codes_are(lengths: list[int]) -> None:
    targets = vector_spans(lengths)
    found, codes = MaskedGmm().corrupt(targets, MASK), Masked().corrupt(targets, -1)
    assert found.hidden is not None
    assert (found.hidden == (codes.token_ids == -1)).all()
    assert (found.loss_weights == found.hidden).all()
    assert found.labels is targets.values


def test_every_vector_is_predicted_from_those_before_it() -> None:
    targets = vector_spans([3, 2])
    found = Gmm().corrupt(targets, MASK)
    assert found.labels is targets.values
    assert found.values is None
    assert (found.loss_weights == 1).all()
    assert (Gmm.shift, Gmm.commits, Gmm.bidirectional) == (-1, True, False)


@pytest.mark.parametrize("kind", [Gmm, MaskedGmm])
@pytest.mark.parametrize("settings", [{"components": 0}, {"min_scale": 0.0}, {"weight": 0.0}])
def test_settings_out_of_range_are_refused(kind: type[MixtureObjective], settings: dict[str, Any]) -> None:
    assert issubclass(kind, Objective)
    assert kind().n_outputs(2) == 16 * 5
    with pytest.raises(ValidationError):
        kind(**settings)


def test_the_entropy_of_a_gaussian_is_the_expected_loss_of_the_truth() -> None:
    """H = 0.5 log(2 pi e sigma^2) nats per number."""
    sigma, n = 0.7, 20_000
    labels = sigma * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    raw = sigma - 1 / sigma  # of which (x + sqrt(x^2 + 4)) / 2 is sigma
    made = torch.tensor([0.0, 0.0, 0.0, raw, raw]).repeat(n, 1)
    loss = float(Gmm(components=1, min_scale=1e-9).loss(made, labels, torch.ones(n))) / n
    assert loss == pytest.approx(0.5 * math.log(2 * math.pi * math.e * sigma**2), abs=0.01)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_guidance_weighs_components_at_the_temperature_that_draws_them(temperature: float) -> None:
    n, scale = 4000, 2.0
    one, other = (
        Mixture(torch.tensor(w).log().repeat(n, 1), torch.tensor([[-9.0], [9.0]]).repeat(n, 1, 1), torch.ones(n, 2, 1))
        for w in ([0.6, 0.4], [0.5, 0.5])
    )
    draw = KeyedDraw(3, 0, 0, SamplingSettings(temperature=temperature, guidance_scale=scale))
    values = guided_sample(one, other, scale, 0, torch.arange(n), draw)
    # Components far apart: w1^s / w0^(s - 1), each to the power 1 / T.
    odds = (0.6 / 0.4) ** (scale / temperature)
    assert float((values < 0).double().mean()) == pytest.approx(odds / (1 + odds), abs=0.03)
