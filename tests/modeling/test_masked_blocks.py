"""Text in masked blocks: each is learnt from clean copies of those before it, and produced from them in its turn."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from span_oracle import END, FIRST, MASK, SCHEDULES, OracleDraw, spans
from strategies import FOUR_MODALITIES, four_modalities, image_part, text_part

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Kept, Objective
from omniform.modeling.objectives.masked import EARLIEST_TIME, Masked, masked_fraction
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, document_length

VOCABULARY = four_modalities()
V = VOCABULARY


def llada(block_size: int) -> Masked:
    return Masked(block_size=block_size, schedule="linear", masking="independent", weighting="elbo")


def objectives(block_size: int) -> dict[str, Objective]:
    masked = llada(block_size)
    return {"text": masked, "image": Masked(), "speech": masked, "video": Masked()}


def test_a_text_is_laid_out_in_blocks_with_clean_copies_of_all_but_the_last() -> None:
    sequence = MultimodalSequence.build([text_part([5, 6, 7, 8, 9], Role.TARGET)], V, objectives(4))
    begin, end = V.begin("text"), V.end
    assert sequence.token_ids.tolist() == [begin, 5, 6, 7, 8, 5, 6, 7, 8, 9, end, end, end]
    assert sequence.position_ids[:, 0].tolist() == [0, *range(1, 5), *range(1, 5), *range(5, 9)]
    assert sequence.span_positions.tolist() == [0, *range(1, 5), *range(1, 5), *range(5, 9)]
    assert sequence.private.tolist() == [False] + [True] * 4 + [False] * 8
    found = [(span.start, span.length, span.role, span.noised) for span in sequence.spans]
    assert found == [(1, 4, Role.TARGET, True), (5, 4, Role.CONTEXT, False), (9, 4, Role.TARGET, False)]


def test_what_follows_reads_a_clean_copy_that_ends_where_the_text_does() -> None:
    parts = [text_part([5, 6, 7, 8, 9], Role.TARGET), image_part([0, 1, 2, 3], Role.TARGET)]
    learnt = MultimodalSequence.build(parts, V, objectives(4))
    end = V.end
    assert learnt.token_ids[9:16].tolist() == [9, end, end, end, 9, end, V.begin("image")]
    read = [text_part([5, 6, 7, 8, 9], Role.CONTEXT), parts[1]]
    context = MultimodalSequence.build(read, V, objectives(4))
    clean = ~learnt.private
    for name in ("token_ids", "position_ids", "span_positions", "bidirectional", "modality_ids"):
        assert getattr(learnt, name)[clean].tolist() == getattr(context, name).tolist()


@given(FOUR_MODALITIES, st.integers(1, 4))
def test_lengths_are_foretold_and_every_target_content_is_in_one_noised_block(
    parts: list[Part], block_size: int
) -> None:
    own = objectives(block_size)
    sequence = MultimodalSequence.build(parts, V, own)
    assert len(sequence) == document_length([(p.modality, len(p.tokens.codes), p.role) for p in parts], V, own)
    noised = [span for span in sequence.spans if span.role is Role.TARGET]
    expected = []
    for part in parts:
        if part.role is Role.TARGET:
            ids, end = V.to_ids(part.modality, part.tokens.codes).tolist(), V.end_of(part.modality)
            expected += ids if end is None else [*ids, end, *[end] * (-(len(ids) + 1) % block_size)]
    found = np.concatenate([sequence.token_ids[s.start : s.start + s.length] for s in noised] or [[]])
    assert found.tolist() == expected


@given(st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_a_block_sees_itself_and_clean_blocks_before_it(n_codes: int, block_size: int, followed: bool) -> None:
    """Compared with BD3-LM's rule, written down for each pair of rows."""
    parts = [text_part([1], Role.CONTEXT), text_part(list(range(n_codes)), Role.TARGET)]
    parts += [text_part([2], Role.CONTEXT)] if followed else []
    sequence = MultimodalSequence.build(parts, V, objectives(block_size))
    allowed = pack([[sequence]], len(sequence), V).pattern.allowed()[0]
    first = 1 + 2  # after the prompt
    place = sequence.span_positions
    last = len(sequence) - (3 if followed else 0)
    noised = np.zeros(len(sequence), dtype=bool)
    for span in sequence.spans:
        if span.role is Role.TARGET:
            noised[span.start : span.start + span.length] = True
    for q, k in itertools.product(range(first + 1, last), range(first + 1, last)):
        block_q, block_k = (place[q] - 1) // block_size, (place[k] - 1) // block_size
        rule = block_q == block_k and noised[q] == noised[k]
        rule |= not noised[k] and (block_k < block_q)
        # A clean copy stands behind its noised block, and may not see it.
        assert bool(allowed[q, k]) == bool(rule)
    assert allowed[first:, : first + 1].all()


STEPPED = st.builds(
    Masked,
    schedule=st.sampled_from(SCHEDULES),
    order=st.sampled_from(["confidence", "random"]),
    remask=st.booleans(),
    choice_temperature=st.floats(0, 10),
    threshold=st.none() | st.floats(0.1, 0.9),
    block_size=st.none() | st.integers(1, 8),
)


@given(STEPPED, st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**31), st.integers(0, 25))
def test_a_perfect_model_recovers_the_text_block_after_block(
    objective: Masked, length: int, steps: int, seed: int, n_text: int
) -> None:
    truth = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))
    truth[n_text:] = END - FIRST
    size = objective.block_size or length
    draw, state, n_passes = OracleDraw(seed), objective.begin(length, steps, MASK), 0
    while not state.done:
        assert state.step < state.n_steps <= min(steps, size)
        before, first = state.token_ids, state.n_final
        inputs = objective.inputs(state, 0)
        assert torch.equal(inputs, before[first : first + size])
        logits = 20.0 * torch.nn.functional.one_hot(truth[first : first + size], 51).float()
        state = objective.step(state, logits, FIRST, END, MASK, draw)
        n_passes += 1
        assert torch.equal(state.token_ids[:first], before[:first])
        assert (state.token_ids[first + size :] == MASK).all()
        assert state.n_final % size == 0
    n_blocks = 1 if objective.block_size is None else min(math.ceil(length / size), n_text // size + 1)
    assert state.token_ids.tolist() == (truth + FIRST)[: n_blocks * size].tolist()
    assert n_passes <= n_blocks * min(steps, size)
    if objective.threshold is None and length % size == 0:
        assert n_passes == n_blocks * min(steps, size)
    elif objective.threshold is not None:
        assert n_passes == n_blocks  # a perfect model is sure of everything


def test_a_threshold_decides_what_is_sure_beside_what_the_schedule_asks_for() -> None:
    """Eight contents, of which five are sure: one step decides those, then the schedule's one or more in each."""
    objective = Masked(schedule="linear", choice_temperature=0, threshold=0.9)
    state = objective.begin(8, 8, MASK)
    logits = torch.zeros(8, 50)
    logits[[0, 2, 3, 5, 7], 4] = 20.0
    state = objective.step(state, logits, FIRST, None, MASK, OracleDraw(0))
    assert (state.token_ids == MASK).tolist() == [False, True, False, False, True, False, True, False]
    state = objective.step(state, logits, FIRST, None, MASK, OracleDraw(0))
    assert int((state.token_ids == MASK).sum()) == 2
    unsure = objective.step(objective.begin(8, 8, MASK), torch.zeros(8, 50), FIRST, None, MASK, OracleDraw(0))
    assert int((unsure.token_ids == MASK).sum()) == 7


def test_losses_are_weighted_by_one_over_the_probability_of_a_mask() -> None:
    """LLaDA, MMaDA: p = (1 - eps) t + eps for uniform t, contents masked with probability p, losses times 1 / p."""
    n, size = 20_000, 4
    corrupted = llada(size).corrupt(spans([size] * n), MASK)
    weights = corrupted.loss_weights.reshape(n, size)
    hidden = (corrupted.token_ids == MASK).reshape(n, size)
    assert ((weights > 0) == hidden).all()
    p = (1 - EARLIEST_TIME) / weights.max(1, where=hidden, initial=1e-9)  # of the spans that have a mask at all
    drawn = p[hidden.any(1)]
    assert drawn.min() >= EARLIEST_TIME * (1 - 1e-6)
    assert drawn.max() <= 1 + 1e-6
    # P(p <= x and some mask) is the integral of 1 - (1 - p)^size.
    for x in (0.1, 0.3, 0.5, 0.8):
        expected = x - (1 - (1 - x) ** (size + 1)) / (size + 1)
        assert abs((drawn <= x).sum() / n - expected) < 5 * math.sqrt(0.25 / n) + EARLIEST_TIME


def test_blocks_of_one_text_have_times_of_their_own() -> None:
    parts = [text_part([1] * 31, Role.TARGET)]
    sequences = [MultimodalSequence.build(parts, V, objectives(16), noise_key=key) for key in range(600)]
    length = len(sequences[0])
    batch = corrupt(pack([[s] for s in sequences], length, V), V, objectives(16))
    masked = (batch.token_ids == V.mask).numpy()
    shares = np.stack([masked[:, 1:17].mean(1), masked[:, 33:49].mean(1)])
    assert abs(np.corrcoef(shares)[0, 1]) < 5 / math.sqrt(600)
    assert not masked[:, 17:33].any()


def test_the_bound_of_true_conditionals_in_blocks_is_the_entropy() -> None:
    """BD3-LM: the bounds of all blocks, each given clean ones before it, add up to one of -log p, tight if exact."""
    joint = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(4)).double() ** 3
    joint /= joint.sum()
    outcomes = list(itertools.product(range(2), repeat=4))
    n_each = 3000
    ids = np.array(outcomes * n_each)
    # Two blocks of two: each its own span, as in the layout.
    targets = spans([2] * (2 * len(ids)))
    corrupted = llada(2).corrupt(targets, MASK)
    hidden = (corrupted.token_ids == MASK).reshape(-1, 4)
    weights = corrupted.loss_weights.reshape(-1, 4)
    losses = np.zeros(len(ids))
    for row, (outcome, mask) in enumerate(zip(ids, hidden, strict=True)):
        for place in np.flatnonzero(mask):
            block = place // 2
            seen = [axis // 2 < block or (axis // 2 == block and not mask[axis]) for axis in range(4)]
            cut = joint[
                tuple(slice(int(v), int(v) + 1) if s else slice(None) for v, s in zip(outcome, seen, strict=True))
            ]
            marginal = cut.sum([axis for axis in range(4) if axis != place]) / cut.sum()
            losses[row] -= weights[row, place] * math.log(marginal[int(outcome[place])])
    probability = np.array([float(joint[outcome]) for outcome in outcomes])
    per_outcome = losses.reshape(n_each, len(outcomes))
    entropy = -(probability * np.log(probability)).sum()
    error = math.sqrt((probability**2 * per_outcome.var(0)).sum() / n_each)
    missing = 4 * math.log(2) * float(masked_fraction(EARLIEST_TIME, "linear"))
    assert -missing - 5 * error < (per_outcome.mean(0) * probability).sum() - entropy < 5 * error


def test_blocks_are_for_spans_of_free_length_and_text_logits_for_causal_text() -> None:
    decoder = DecoderConfig(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=16)
    plain = {"text": NextToken(), "image": Masked(), "speech": NextToken(), "video": Masked()}
    with pytest.raises(
        ConfigError, match=r"objectives\.image\.block_size is 2, but all spans of image have one length"
    ):
        UnifiedModel(ModelConfig(decoder=decoder, objectives=plain | {"image": Masked(block_size=2)}), V)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives(4)), V)
    with pytest.raises(ConfigError, match="learnt text as masked, in both directions"):
        model.text_logits(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="not edited"):
        Masked(block_size=2).begin(4, None, MASK, Kept(torch.tensor([True, False, False, False]), torch.arange(4)))
