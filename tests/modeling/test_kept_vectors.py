"""Vectors that stay while others of their span are made anew: they go the way of noised data, and are themselves in
the end."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniform.inference.sampling import KeyedDraw
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.base import Kept
from omniform.modeling.objectives.ddpm import N_TIMES, Ddpm
from omniform.modeling.objectives.flow import Flow
from omniform.modeling.objectives.gmm import Gmm
from omniform.modeling.objectives.masked_gmm import MaskedGmm
from omniform.modeling.objectives.solved import Solved

MASK = 7
WANTED = st.lists(st.booleans(), min_size=1, max_size=7).filter(any)


def edited(wanted: list[bool], seed: int) -> tuple[Tensor, Kept]:
    """What a perfect model would draw, and an item that differs from it everywhere."""
    truth = torch.randn(len(wanted), 3, generator=torch.Generator().manual_seed(seed))
    ids = torch.full((len(wanted),), MASK)
    return truth, Kept(torch.tensor(wanted), ids, truth + 5)


@given(
    st.sampled_from([Flow(), Flow(solver="heun"), Flow(time_shift=3.0), Ddpm(), Ddpm(eta=0.0)]),
    st.integers(1, 12),
    WANTED,
    st.integers(0, 2**31),
)
def test_kept_vectors_are_noised_data_on_the_way_and_themselves_at_the_end(
    objective: Solved, steps: int, wanted: list[bool], seed: int
) -> None:
    truth, kept = edited(wanted, seed)
    assert kept.values is not None
    draw = KeyedDraw(seed, 0, 0, SamplingSettings())
    alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    state = objective.begin(len(wanted), steps, MASK, kept)
    noise = draw.normal(0, torch.arange(len(wanted)), 3)
    while not state.done:
        seen = objective.vectors(state, 3, draw)
        t = seen.times[0]
        if isinstance(objective, Flow):
            expected = (1 - t) * kept.values + t * noise
            outputs = (seen.values - truth) / t
        else:
            of_data = alphas[round(float(t) * N_TIMES)]
            expected = of_data.sqrt() * kept.values + (1 - of_data).sqrt() * noise
            outputs = (seen.values - of_data.sqrt() * truth) / (1 - of_data).sqrt()
        torch.testing.assert_close(seen.values[~kept.wanted], expected[~kept.wanted], atol=1e-5, rtol=1e-5)
        state = objective.step(state, outputs, 0, None, MASK, draw)
    assert state.values is not None
    assert torch.equal(state.values[~kept.wanted], kept.values[~kept.wanted])
    torch.testing.assert_close(state.values[kept.wanted], truth[kept.wanted], atol=2e-3, rtol=2e-3)


def outputs_for(means: Tensor, components: int) -> Tensor:
    """What a head says that is nearly sure of one vector per row: its first component is chosen, and narrow."""
    n, channels = means.shape
    logits = torch.full((n, components), -30.0)
    logits[:, 0] = 0.0
    scales = torch.full((n, components * channels), -1e6)
    return torch.cat([logits, means.repeat(1, components), scales], dim=1)


@given(st.integers(1, 9), WANTED, st.integers(0, 2**31))
def test_masked_mixtures_read_what_is_kept_and_fill_in_the_rest(steps: int, wanted: list[bool], seed: int) -> None:
    truth, kept = edited(wanted, seed)
    assert kept.values is not None
    objective = MaskedGmm(components=2, min_scale=1e-6)
    draw = KeyedDraw(seed, 0, 0, SamplingSettings())
    state = objective.begin(len(wanted), steps, MASK, kept)
    n_steps = 0
    while not state.done:
        seen = objective.vectors(state, 3, draw)
        assert seen is not None
        assert set((~kept.wanted).nonzero().flatten().tolist()) <= set(seen.rows.tolist())
        expected = torch.where(kept.wanted[:, None], truth, kept.values)
        torch.testing.assert_close(seen.values, expected[seen.rows], atol=1e-3, rtol=0)
        state = objective.step(state, outputs_for(truth, 2), 0, None, MASK, draw)
        n_steps += 1
    assert n_steps == min(steps, sum(wanted))
    assert state.values is not None
    assert torch.equal(state.values[~kept.wanted], kept.values[~kept.wanted])
    torch.testing.assert_close(state.values[kept.wanted], truth[kept.wanted], atol=1e-3, rtol=0)


@given(WANTED, st.integers(0, 2**31))
def test_next_vectors_are_put_where_they_are_kept(wanted: list[bool], seed: int) -> None:
    truth, kept = edited(wanted, seed)
    assert kept.values is not None
    objective = Gmm(components=2, min_scale=1e-6)
    draw = KeyedDraw(seed, 0, 0, SamplingSettings())
    state = objective.begin(len(wanted), None, MASK, kept)
    while not state.done:
        outputs = outputs_for(truth[state.step : state.step + 1], 2)
        state = objective.step(state, outputs, 0, None, MASK, draw)
    assert state.values is not None
    expected = torch.where(kept.wanted[:, None], truth, kept.values)
    torch.testing.assert_close(state.values, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("objective", [Flow(steps=3), Ddpm(steps=3), MaskedGmm(steps=3)])
def test_an_edit_that_keeps_nothing_is_a_new_span(objective: Solved | MaskedGmm) -> None:
    _, kept = edited([True] * 4, 0)
    found = []
    for own in (None, kept):
        draw = KeyedDraw(1, 0, 0, SamplingSettings())
        state = objective.begin(4, None, MASK, own)
        while not state.done:
            state = objective.step(state, torch.full((4, objective.n_outputs(3)), 0.1), 0, None, MASK, draw)
        found.append(state.values)
    assert torch.equal(*found)
