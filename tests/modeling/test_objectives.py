import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from span_oracle import END, FIRST, MASK, SCHEDULES, OracleDraw, spans

from omniform.inference.sampling import KeyedDraw
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.objectives.base import Kept, Objective
from omniform.modeling.objectives.masked import EARLIEST_TIME, Masked, Schedule, masked_fraction, masking_rate
from omniform.modeling.objectives.next_token import NextToken


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_masking_is_per_span_at_least_one_and_independent_of_batch_mates(lengths: list[int]) -> None:
    together = Masked().corrupt(spans(lengths), MASK)
    hidden = together.token_ids == MASK
    assert (hidden == (together.loss_weights == 1)).all()
    assert (together.token_ids[~hidden] == spans(lengths).token_ids[~hidden]).all()
    start = 0
    for key, length in enumerate(lengths):
        alone = Masked().corrupt(spans([length], first_key=key), MASK)
        assert (hidden[start : start + length] == (alone.token_ids == MASK)).all()
        assert hidden[start : start + length].sum() >= 1
        start += length


def test_masked_fraction_follows_gamma_and_places_are_equally_likely() -> None:
    n, length = 20_000, 16
    hidden = (Masked().corrupt(spans([length] * n), MASK).token_ids == MASK).reshape(n, length)
    # P(count <= k) = P(sin(pi t / 2) n <= k) = 2 / pi * arcsin(k / n) for uniform t.
    counts = hidden.sum(1)
    for k in range(1, length + 1):
        expected = 2 / math.pi * math.asin(k / length)
        assert abs((counts <= k).mean() - expected) < 4 * math.sqrt(0.25 / n)
    # gamma's mean over uniform t is 2 / pi; rounding up adds half a token on average.
    assert abs(hidden.mean() - (2 / math.pi + 0.5 / length)) < 0.01
    assert np.ptp(hidden.mean(0)) < 8 * math.sqrt(0.25 / n)


OBJECTIVES = st.builds(
    Masked,
    schedule=st.sampled_from(SCHEDULES),
    order=st.sampled_from(["confidence", "random"]),
    remask=st.booleans(),
    choice_temperature=st.floats(0, 10),
)


@given(OBJECTIVES, st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**31), st.data())
def test_a_perfect_model_recovers_the_span_in_any_number_of_steps(
    objective: Masked, length: int, steps: int, seed: int, data: st.DataObject
) -> None:
    truth = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))
    wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any)))
    # Contents to keep that no model would predict: they must stay all the same.
    given_ids = torch.where(wanted, MASK, (truth + 1) % 50 + FIRST)
    draw = OracleDraw(seed)
    state = objective.begin(length, steps, MASK, None if wanted.all() else Kept(wanted, given_ids))
    n_masked = [int(wanted.sum())]
    while not state.done:
        assert state.step < min(steps, n_masked[0])
        logits = 20.0 * torch.nn.functional.one_hot(truth, 50).float()
        before = objective.inputs(state, 0)
        state = objective.step(state, logits, FIRST, None, MASK, draw)
        kept = (before != MASK) if not objective.remask else ~wanted
        assert torch.equal(state.token_ids[kept], before[kept])
        n_masked.append(int((state.token_ids == MASK).sum()))
    assert state.step == state.n_steps == min(steps, n_masked[0])
    assert torch.equal(state.token_ids[wanted], truth[wanted] + FIRST)
    assert torch.equal(state.token_ids[~wanted], given_ids[~wanted])
    assert all(later < earlier for earlier, later in itertools.pairwise(n_masked))


@given(st.integers(1, 12), st.data())
def test_next_token_keeps_contents_in_their_places(length: int, data: st.DataObject) -> None:
    wanted = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    kept = Kept(wanted, torch.full((length,), FIRST + 7))
    objective, draw = NextToken(), OracleDraw(0)
    state = objective.begin(length, None, MASK, kept)
    while not state.done:
        logits = torch.nn.functional.one_hot(torch.tensor([state.step]), 50).float()
        state = objective.step(state, logits, FIRST, None, MASK, draw)
    assert torch.equal(state.token_ids, torch.where(wanted, torch.arange(length) + FIRST, FIRST + 7))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_from_data_to_noise_and_the_rate_is_their_slope(schedule: Schedule) -> None:
    t = np.linspace(0, 1, 1001)
    gamma = masked_fraction(t, schedule)
    assert (gamma[0], gamma[-1]) == (0, 1)
    assert (np.diff(gamma) > 0).all()
    middle = (t[1:-1] + 1e-6, t[1:-1] - 1e-6)
    slope = (masked_fraction(middle[0], schedule) - masked_fraction(middle[1], schedule)) / 2e-6
    np.testing.assert_allclose(masking_rate(t[1:-1], schedule), slope, rtol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_independent_masking_hides_gammas_share_and_elbo_weights_add_up_to_the_contents(schedule: Schedule) -> None:
    n, length = 40_000, 4
    targets = spans([length] * n)
    uniform = Masked(schedule=schedule, masking="independent").corrupt(targets, MASK)
    t = np.linspace(0, 1, 100_001)
    assert abs(uniform.loss_weights.mean() - masked_fraction(t, schedule).mean()) < 0.01
    elbo = Masked(schedule=schedule, masking="independent", weighting="elbo").corrupt(targets, MASK)
    assert ((elbo.token_ids == MASK) == (elbo.loss_weights > 0)).all()
    assert elbo.count == n * length
    # The integral of gamma' over the times that are drawn: 1, less gamma where they begin.
    expected = 1 - masked_fraction(EARLIEST_TIME, schedule)
    error = elbo.loss_weights.reshape(n, length).mean(1).std() / math.sqrt(n)
    assert abs(elbo.loss_weights.mean() - expected) < 5 * error


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_elbo_of_the_true_conditionals_is_the_entropy(schedule: Schedule) -> None:
    """MDLM: with the exact predictor the bound is tight, because unmasking one content at a time is the chain rule."""
    joint = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(3)).double() ** 3
    joint /= joint.sum()
    outcomes = list(itertools.product(range(2), repeat=3))
    n_each = 4000
    ids = np.array(outcomes * n_each)
    targets = replace(spans([3] * len(ids)), token_ids=ids.ravel() + FIRST)
    corrupted = Masked(schedule=schedule, masking="independent", weighting="elbo").corrupt(targets, MASK)
    hidden = (corrupted.token_ids == MASK).reshape(-1, 3)
    weights = corrupted.loss_weights.reshape(-1, 3)
    losses = np.zeros(len(ids))
    for row, (outcome, mask) in enumerate(zip(ids, hidden, strict=True)):
        given_joint = joint[
            tuple(slice(None) if m else slice(int(v), int(v) + 1) for v, m in zip(outcome, mask, strict=True))
        ]
        for place in np.flatnonzero(mask):
            others = [axis for axis in range(3) if axis != place]
            marginal = given_joint.sum(others) / given_joint.sum()
            losses[row] -= weights[row, place] * math.log(marginal[int(outcome[place])])
    probability = np.array([float(joint[outcome]) for outcome in outcomes])
    per_outcome = losses.reshape(n_each, len(outcomes))
    entropy = -(probability * np.log(probability)).sum()
    error = math.sqrt((probability**2 * per_outcome.var(0)).sum() / n_each)
    # What lies below EARLIEST_TIME is left out: at most log 2 nats for each content masked there.
    missing = 3 * math.log(2) * float(masked_fraction(EARLIEST_TIME, schedule))
    assert -missing - 5 * error < (per_outcome.mean(0) * probability).sum() - entropy < 5 * error


def test_elbo_weights_are_refused_for_counted_masks() -> None:
    with pytest.raises(ValidationError, match="independent"):
        Masked(weighting="elbo")


def test_remasking_takes_back_the_least_confident_decision() -> None:
    """Four contents in four steps without noise: the first is decided at probability 1/2, the rest then at nearly 1."""
    objective, draw = Masked(schedule="linear", remask=True, choice_temperature=0), OracleDraw(0)
    state = objective.begin(4, 4, MASK)
    sure, unsure = torch.tensor([9.0, 0.0]), torch.tensor([0.1, 0.0])
    state = objective.step(state, torch.stack([unsure, unsure / 2, unsure / 3, unsure / 4]), FIRST, None, MASK, draw)
    assert (state.token_ids == MASK).tolist() == [False, True, True, True]
    state = objective.step(state, torch.stack([unsure, sure, sure, unsure / 4]), FIRST, None, MASK, draw)
    assert (state.token_ids == MASK).tolist() == [True, False, False, True]


def test_steps_leave_the_fractions_of_the_cosine_schedule() -> None:
    """MaskGIT: after step i of N, floor(cos(pi i / 2 N) * n) tokens stay masked."""
    objective, draw, length, steps = Masked(), OracleDraw(0), 256, 8
    state = objective.begin(length, steps, MASK)
    for done in range(1, steps + 1):
        state = objective.step(state, torch.zeros(length, 50), FIRST, None, MASK, draw)
        left = int((state.token_ids == MASK).sum())
        assert left == (math.floor(math.cos(math.pi * done / (2 * steps)) * length) if done < steps else 0)
    assert state.done


@pytest.mark.parametrize("objective", [NextToken(), Masked()], ids=lambda o: o.kind)
def test_uniform_logits_cost_log_of_the_range_and_unweighted_rows_nothing(objective: Objective) -> None:
    weights = torch.tensor([1.0, 0.0, 2.0])
    logits = torch.zeros(3, 7)
    logits[1] = float("nan")
    loss = objective.loss(logits, torch.tensor([0, 0, 6]), weights)
    assert loss.item() == pytest.approx(3 * math.log(7))


def test_next_token_stops_at_the_end_or_at_its_length() -> None:
    objective, draw = NextToken(), OracleDraw(0)
    for script, expected in (([3, 4, 50, 5], [103, 104, 150]), ([1, 2, 3, 4], [101, 102, 103, 104])):
        state = objective.begin(4, None, MASK)
        for code in script:
            assert objective.inputs(state, 7).tolist() == [state.token_ids[-1].item() if state.step else 7]
            logits = torch.nn.functional.one_hot(torch.tensor([code]), 51).float()
            state = objective.step(state, logits, FIRST, END, MASK, draw)
            if state.done:
                break
        assert state.done
        assert state.token_ids.tolist() == expected


def test_next_token_leaves_its_contents_untouched_and_counts_all() -> None:
    corrupted = NextToken().corrupt(spans([3, 2]), MASK)
    assert (corrupted.token_ids == spans([3, 2]).token_ids).all()
    assert (corrupted.loss_weights == 1).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_input_dropout_hides_all_but_the_last_content_and_counts_all(lengths: list[int], share: float) -> None:
    clean, objective = spans(lengths), NextToken(input_dropout=share)
    corrupted = objective.corrupt(clean, MASK)
    hidden = corrupted.token_ids == MASK
    assert (corrupted.token_ids[~hidden] == clean.token_ids[~hidden]).all()
    assert not hidden[np.cumsum(lengths) - 1].any()
    assert (corrupted.loss_weights == 1).all()
    alone = objective.corrupt(spans(lengths[-1:], first_key=len(lengths) - 1), MASK)
    assert ((alone.token_ids == MASK) == hidden[len(hidden) - lengths[-1] :]).all()


def test_input_dropout_hides_each_content_with_its_probability() -> None:
    clean = spans([11] * 2000)
    hidden = NextToken(input_dropout=0.3).corrupt(clean, MASK).token_ids == MASK
    by_place = hidden.reshape(2000, 11)[:, :-1].mean(0)
    assert np.abs(by_place - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 2000)


def test_a_threshold_reads_what_the_model_says_and_not_what_truncation_leaves() -> None:
    objective, draw = Masked(threshold=0.9, steps=4), KeyedDraw(0, 0, 0, SamplingSettings(top_k=1))
    state = objective.begin(8, None, MASK)
    state = objective.step(state, torch.arange(5.0).repeat(8, 1) / 100, FIRST, None, MASK, draw)  # sure of nothing
    assert int((state.token_ids == MASK).sum()) == math.floor(masked_fraction(0.75) * 8)


def test_blocks_are_decided_in_random_orders_of_their_own() -> None:
    objective, draw = Masked(block_size=8, order="random", steps=8), KeyedDraw(0, 0, 0, SamplingSettings())
    state, orders = objective.begin(16, None, MASK), list[int]()
    while not state.done:
        before, n_rows = state.token_ids == MASK, len(objective.inputs(state, 0))
        state = objective.step(state, torch.zeros(n_rows, 5), FIRST, END, MASK, draw)
        orders += (before & (state.token_ids != MASK)).nonzero().flatten().tolist()
    assert sorted(orders) == [*range(16)]
    assert orders[:8] != [place - 8 for place in orders[8:]]
