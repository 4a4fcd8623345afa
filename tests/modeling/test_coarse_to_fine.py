"""Levels filled in one after the other: what training hides, and what each step of decoding decides."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from coded_speech import codebooks_of, coded_part, coded_vocabulary, frames_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from span_oracle import SCHEDULES, OracleDraw

from omniform.modeling.codebooks import NOTHING
from omniform.modeling.config import ConfigError, ModelConfig, parse_config
from omniform.modeling.objectives.base import SpanState, TargetSpans
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine, LevelState
from omniform.modeling.objectives.masked import masked_fraction
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role

Q, SIZE = 3, 5
VOCABULARY = coded_vocabulary(Q, SIZE)
MASK, END = VOCABULARY.mask, VOCABULARY.end_of("speech")
assert END is not None


def targets_of(lengths: list[int], block_size: int, first_key: int = 0) -> TargetSpans:
    objectives = {"speech": CoarseToFine(block_size=block_size)}
    documents = [
        MultimodalSequence.build(
            [coded_part(frames_of(n, Q, SIZE, n), Role.TARGET)], VOCABULARY, objectives, first_key + place
        )
        for place, n in enumerate(lengths)
    ]
    return pack([[d] for d in documents], max(map(len, documents)), VOCABULARY).targets["speech"]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 2**40))
def test_a_level_is_masked_coarser_ones_are_read_and_finer_ones_are_not(lengths: list[int], key: int) -> None:
    targets, objective = targets_of(lengths, 8, key), CoarseToFine(block_size=8)
    found = objective.corrupt(targets, MASK)
    assert targets.codebooks is not None
    start = 0
    for span, n_frames in enumerate(lengths):
        own = slice(start, start + n_frames * Q + 8 - n_frames)
        start = own.stop
        clean, read, weights = (values[own] for values in (targets.token_ids, found.token_ids, found.loss_weights))
        of = targets.codebooks[own]
        # Which level it is shows in what is left out, but for spans without frames, which have one level.
        left_out = {int(q) for q in of[read == NOTHING]}
        level = min(left_out, default=Q) - 1
        if n_frames:
            assert left_out == set(range(level + 1, Q))
            n_masked = int((read[of == level] == MASK).sum())
            assert 1 <= n_masked <= (8 if level == 0 else n_frames)
            assert (read[of < level] == clean[of < level]).all()
        assert ((read == MASK) == (weights == 1)).all()
        assert ((weights == 0) | (weights == 1)).all()
        shown = (read != MASK) & (read != NOTHING)
        assert (read[shown] == clean[shown]).all()
        alone = objective.corrupt(targets_of([n_frames], 8, key + span), MASK)
        assert (alone.token_ids == read).all()


def test_levels_are_equally_likely_and_gammas_share_of_one_is_masked() -> None:
    n, n_frames = 1000, 7
    targets = targets_of([n_frames] * n, n_frames + 1)
    hidden = (CoarseToFine(block_size=n_frames + 1).corrupt(targets, MASK).token_ids == MASK).reshape(n, -1)
    assert targets.codebooks is not None
    by_level = np.stack([hidden[:, targets.codebooks[: hidden.shape[1]] == q].sum(1) for q in range(Q)])
    levels = by_level.argmax(0)
    assert (np.sort(by_level, 0)[:-1] == 0).all()
    assert (np.abs(np.bincount(levels) / n - 1 / Q) < 4 * np.sqrt(1 / Q * (1 - 1 / Q) / n)).all()
    for level, most in ((0, n_frames + 1), (1, n_frames), (2, n_frames)):
        masked = by_level[level, levels == level]
        expected = np.ceil(masked_fraction(np.linspace(0, 1, 20_001)[1:]) * most).mean()
        assert abs(masked.mean() - expected) < 4 * masked.std() / np.sqrt(len(masked))


def oracle_logits(state: SpanState, truth: torch.Tensor, objective: CoarseToFine) -> torch.Tensor:
    rows, codebooks = objective.asked(state)
    choices = VOCABULARY.to_choices("speech", truth[state.n_final + rows, codebooks], codebooks)
    return 20.0 * torch.nn.functional.one_hot(choices, SIZE + 1).float()


@given(
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from(SCHEDULES),
    st.tuples(st.integers(1, 8), st.integers(1, 4), st.floats(0, 10)),
    st.integers(0, 999),
)
def test_a_perfect_model_recovers_any_span_in_the_passes_that_are_asked_for(
    n_frames: int, block_size: int, room: int, schedule: str, how: tuple[int, int, float], seed: int
) -> None:
    steps, finer, temperature = how
    objective = CoarseToFine(
        block_size=block_size, schedule=schedule, finer_steps=finer, choice_temperature=temperature
    )
    codebooks, draw = codebooks_of(objective, VOCABULARY), OracleDraw(seed)
    frames = frames_of(n_frames, Q, SIZE, seed)
    truth = codebooks.arrange(frames)
    truth = torch.cat([truth, truth[-1:].expand(room + block_size, -1)])  # ends fill up
    state, passes = objective.begin_coded(room, steps, MASK, codebooks), 0
    while not state.done:
        before, first = objective.inputs(state, 0), state.n_final
        state = objective.step(state, oracle_logits(state, truth, objective), -1, END, MASK, draw)
        decided = (before != MASK) & (before != NOTHING)
        assert torch.equal(state.token_ids[first : first + len(before)][decided], before[decided])
        passes += 1
    assert torch.equal(codebooks.restore(state.token_ids), frames[:room])
    expected = 0
    for start in range(0, min(n_frames + 1, room), block_size):
        n_rows = min(block_size, room - start)
        n_whole = max(0, min(n_rows, n_frames - start))
        expected += min(steps, n_rows) + (Q - 1) * min(finer, n_whole)
    assert passes == expected


@given(st.integers(0, 10_000), st.integers(0, 2), st.integers(2, 6))
def test_a_step_keeps_the_most_confident_as_a_slow_rule_says(seed: int, level: int, n_steps: int) -> None:
    """Rows sorted one by one by log-probability plus noise; the first ones are decided."""
    n_rows, generator = 8, torch.Generator().manual_seed(seed)
    objective = CoarseToFine(block_size=n_rows, choice_temperature=3.0)
    codebooks = codebooks_of(objective, VOCABULARY)
    rows = codebooks.arrange(frames_of(n_rows, Q, SIZE, seed))[:n_rows]
    rows[:, level] = MASK
    rows[:, level + 1 :] = NOTHING
    state = LevelState(rows, 0, n_steps, codebooks=codebooks, level=level, steps=n_steps)
    logits = torch.randn(n_rows, SIZE + 1, generator=generator)
    logits[:, SIZE] = -100.0  # no ends here
    changed = objective.step(state, logits, -1, END, MASK, OracleDraw(seed))
    left = 1 - 1 / n_steps
    n_left = max(int(np.floor(masked_fraction(left) * n_rows)), n_steps - 1)
    noise, scores = OracleDraw(seed).gumbel(0, torch.arange(n_rows)), []
    for row in range(n_rows):
        best = logits[row].log_softmax(-1).max()
        scores.append((float(best.double() + 3.0 * left * noise[row]), row))
    masked = {row for _, row in sorted(scores)[:n_left]}
    assert {row for row in range(n_rows) if changed.token_ids[row, level] == MASK} == masked
    for row in set(range(n_rows)) - masked:
        assert changed.token_ids[row, level] == VOCABULARY.codebook_range("speech", level).start + logits[row].argmax()
    others = [q for q in range(Q) if q != level]
    assert torch.equal(changed.token_ids[:, others], rows[:, others])


def test_nothing_but_ends_follows_an_end_that_was_decided() -> None:
    objective = CoarseToFine(block_size=4, steps=1)
    codebooks = codebooks_of(objective, VOCABULARY)
    state = objective.begin_coded(4, None, MASK, codebooks)
    logits = 20.0 * torch.nn.functional.one_hot(torch.tensor([1, SIZE, 2, 3]), SIZE + 1).float()
    state = objective.step(state, logits, -1, END, MASK, OracleDraw(0))
    first = VOCABULARY.codebook_range("speech", 0).start + 1
    nothing = NOTHING
    assert state.token_ids.tolist() == [[first, MASK, nothing], *[[END, nothing, nothing]] * 3]
    assert objective.asked(state).rows.tolist() == [0]


def test_a_block_size_is_required_and_one_codebook_refused() -> None:
    with pytest.raises(ConfigError, match=r"objectives\.speech\.block_size: required"):
        parse_config(ModelConfig, "objectives: {text: next_token, speech: coarse_to_fine}")
    with pytest.raises(ValidationError, match="block_size"):
        replace(CoarseToFine(block_size=1), block_size=0)
    with pytest.raises(ValueError, match="use masked"):
        CoarseToFine(block_size=4).begin(4, None, MASK)
