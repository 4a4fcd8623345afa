import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniform.modeling.objectives.base import Objective, TargetSpans
from omniform.modeling.objectives.masked import Masked, masked_fraction
from omniform.modeling.objectives.next_token import NextToken

MASK, FIRST, END = 999, 100, 150


class OracleDraw:
    """A draw that takes the likeliest token, with noise from a seeded generator for the confidence."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, logits: torch.Tensor, step: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        best = logits.log_softmax(-1).max(-1)
        return best.indices, best.values

    def gumbel(self, step: int, positions: torch.Tensor) -> torch.Tensor:
        return -torch.log(-torch.log(torch.rand(len(positions), generator=self.generator)))


def spans(lengths: list[int], first_key: int = 0) -> TargetSpans:
    total = sum(lengths)
    index = np.repeat(np.arange(len(lengths)), lengths)
    return TargetSpans(
        token_ids=np.arange(total) % 50 + FIRST,
        rows=np.arange(total),
        span_index=index,
        positions=np.concatenate([np.arange(n) for n in lengths]),
        lengths=np.array(lengths),
        noise_keys=np.arange(first_key, first_key + len(lengths), dtype=np.uint64),
        span_numbers=np.zeros(len(lengths), dtype=np.int64),
    )


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


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**31))
def test_a_perfect_model_recovers_the_span_in_any_number_of_steps(length: int, steps: int, seed: int) -> None:
    truth = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))
    objective, draw = Masked(), OracleDraw(seed)
    state = objective.begin(length, steps, MASK)
    n_masked = [length]
    while not state.done:
        assert state.step < min(steps, length)
        logits = 20.0 * torch.nn.functional.one_hot(truth, 50).float()
        before = objective.inputs(state, 0)
        state = objective.step(state, logits, FIRST, None, MASK, draw)
        kept = before != MASK
        assert torch.equal(state.token_ids[kept], before[kept])
        n_masked.append(int((state.token_ids == MASK).sum()))
    assert torch.equal(state.token_ids, truth + FIRST)
    assert all(later < earlier for earlier, later in itertools.pairwise(n_masked))


def test_steps_leave_the_fractions_of_the_cosine_schedule() -> None:
    """MaskGIT: after step i of N, floor(cos(pi i / 2 N) * n) tokens stay masked."""
    objective, draw, length, steps = Masked(), OracleDraw(0), 256, 8
    state = objective.begin(length, steps, MASK)
    for done in range(1, steps + 1):
        state = objective.step(state, torch.zeros(length, 50), FIRST, None, MASK, draw)
        left = int((state.token_ids == MASK).sum())
        assert left == (math.floor(math.cos(math.pi * done / (2 * steps)) * length) if done < steps else 0)
    assert state.done


def test_gamma_runs_from_data_to_noise() -> None:
    assert masked_fraction(0.0) == 0
    assert masked_fraction(1.0) == 1


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
