"""Rows of several codes against slow references: what they hold, what they are predicted from, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from coded_speech import BLOCK, codebooks_of, coded_model, coded_objectives, coded_part, coded_vocabulary, frames_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import text_part

from omniform.modeling.codebooks import NOTHING
from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.coarse_to_fine import CoarseToFine
from omniform.modeling.objectives.flow import Flow
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import PackedBatch, pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, SequenceError, document_length
from omniform.tokenizers.base import Discrete, Tokens
from omniform.tokenizers.vocabulary import Vocabulary

LAYOUTS = st.sampled_from(["flattened", "delayed", "parallel"])


def reference_rows(kind: str, frames: list[list[int]], vocabulary: Vocabulary) -> list[dict[int, int]]:
    """By row of a span, what it holds: {codebook: id}, one code after the other."""
    rows: dict[int, dict[int, int]] = {}
    n_codebooks = vocabulary.n_codebooks("speech")
    place = {
        "flattened": lambda t, q: t * n_codebooks + q,
        "delayed": lambda t, q: t + q,
        "parallel": lambda t, q: t,
    }[kind]
    for t, frame in enumerate(frames):
        for q, code in enumerate(frame):
            rows.setdefault(place(t, q), {})[q] = vocabulary.codebook_range("speech", q).start + code
    end = vocabulary.end_of("speech")
    assert end is not None
    rows.setdefault(place(len(frames), 0), {})[0] = end
    return [rows[row] for row in range(len(rows))]


@given(LAYOUTS, st.integers(0, 7), st.integers(2, 5), st.integers(1, 6), st.integers(0, 99), st.sampled_from(Role))
def test_a_span_holds_what_its_layout_says_and_gives_it_back(
    kind: str, n_frames: int, n_codebooks: int, size: int, seed: int, role: Role
) -> None:
    vocabulary, objective = coded_vocabulary(n_codebooks, size), coded_objectives()[kind]
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    frames = frames_of(n_frames, n_codebooks, size, seed)
    parts = [text_part([3], Role.CONTEXT), coded_part(frames, role)]
    sequence = MultimodalSequence.build(parts, vocabulary, objectives)
    described = [(part.modality, len(part.tokens), part.role) for part in parts]
    assert len(sequence) == document_length(described, vocabulary, objectives)
    expected = reference_rows(kind, frames.tolist(), vocabulary)
    if kind == "parallel" and role is Role.TARGET:  # an end fills up the last block
        expected += [expected[-1]] * (-len(expected) % BLOCK)
        blocks = [list(range(first, first + BLOCK)) for first in range(0, len(expected), BLOCK)]
        # Each block twice, but for the last, which nothing follows: its clean copy is what the next one reads.
        expected = [expected[row] for block in blocks for row in block + block * (block != blocks[-1])]
    held = sequence.coded["speech"]
    assert held.rows.tolist() == list(range(4, len(sequence)))
    assert set(sequence.token_ids[4:].tolist()) == {vocabulary.mask}
    assert [{q: i for q, i in enumerate(row) if i != NOTHING} for row in held.ids.tolist()] == expected
    if kind != "parallel" or role is Role.CONTEXT:
        codebooks = codebooks_of(objective, vocabulary)
        assert torch.equal(codebooks.restore(held.ids), frames)
        assert codebooks.n_rows(frames.numel()) == len(held)


@given(LAYOUTS, st.integers(1, 9), st.integers(2, 5))
def test_frames_and_their_end_take_as_many_rows_as_is_said(kind: str, n_frames: int, n_codebooks: int) -> None:
    codebooks = codebooks_of(coded_objectives()[kind], coded_vocabulary(n_codebooks, 3))
    assert codebooks.n_rows(n_frames * n_codebooks) == codebooks.layout.n_steps(n_frames) + codebooks.n_end_rows
    assert codebooks.n_codes(codebooks.fewest) == n_codebooks
    assert codebooks.n_codes(codebooks.fewest - 1) == 0


@given(st.sampled_from(["flattened", "delayed"]), st.integers(0, 6), st.integers(2, 5), st.integers(0, 2**63))
def test_dropout_never_hides_the_end(kind: str, n_frames: int, n_codebooks: int, key: int) -> None:
    vocabulary = coded_vocabulary(n_codebooks, 3)
    objective = replace(coded_objectives()[kind], input_dropout=0.9)
    parts = [coded_part(frames_of(n_frames, n_codebooks, 3, 0), Role.TARGET)]
    sequence = MultimodalSequence.build(parts, vocabulary, {"speech": objective}, key)
    batch = pack([[sequence]], len(sequence), vocabulary)
    found = corrupt(batch, vocabulary, {"speech": objective, "text": NextToken()})
    assert int((found.coded["speech"].ids == vocabulary.end_of("speech")).sum()) == 1


@given(LAYOUTS, st.integers(1, 40), st.integers(2, 5))
def test_so_many_rows_hold_no_more_frames_than_they_say(kind: str, n_rows: int, n_codebooks: int) -> None:
    vocabulary = coded_vocabulary(n_codebooks, 3)
    codebooks = codebooks_of(coded_objectives()[kind], vocabulary)
    whole = codebooks.n_codes(n_rows) // n_codebooks
    assert codebooks.layout.n_steps(whole) <= n_rows < codebooks.layout.n_steps(whole + 1)


def packed_documents(objective: Objective, vocabulary: Vocabulary, row_length: int = 64) -> PackedBatch:
    """Two documents in a row and one in the next: with speech as context and as target, the longer one last."""
    n_codebooks, size = vocabulary.n_codebooks("speech"), 5
    speech = [frames_of(n, n_codebooks, size, n) for n in (3, 0, 2)]
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    documents = [
        [text_part([4, 5], Role.CONTEXT), coded_part(speech[0], Role.TARGET)],
        [coded_part(speech[2], Role.CONTEXT), text_part([7], Role.TARGET), coded_part(speech[1], Role.TARGET)],
        [coded_part(speech[2], Role.TARGET), text_part([9, 1], Role.TARGET)],
    ]
    built = [MultimodalSequence.build(d, vocabulary, objectives, key) for key, d in enumerate(documents)]
    return pack([built[:2], built[2:]], row_length, vocabulary)


def hidden_of(model: UnifiedModel, batch: PackedBatch) -> torch.Tensor:
    rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
    return model.hidden(*rows, batch.pattern, coded=batch.coded)


@pytest.mark.parametrize("kind", ["flattened", "delayed"])
def test_the_loss_is_that_of_each_code_given_the_row_before_it(kind: str) -> None:
    """Frame by frame and codebook by codebook, with torch's own cross-entropy on the rows of the head."""
    vocabulary, objective = coded_vocabulary(3, 5), coded_objectives()[kind]
    model = coded_model(objective, vocabulary)
    batch = packed_documents(objective, vocabulary)
    found = corrupt(batch, vocabulary, model.config.objectives)
    hidden, weight = hidden_of(model, batch), model.interface.head.weight
    end = vocabulary.end_of("speech")
    assert end is not None
    expected, count = torch.zeros(()), 0
    # (row of the batch, first row of the span, frames) of what is learnt, by hand.
    second = 5 + len(reference_rows(kind, frames_of(3, 3, 5, 3).tolist(), vocabulary))
    last = second + 1 + len(reference_rows(kind, frames_of(2, 3, 5, 2).tolist(), vocabulary)) + 3 + 1
    for line, first, n_frames in ((0, 5, 3), (0, last, 0), (1, 1, 2)):
        frames = frames_of(n_frames, 3, 5, n_frames)
        codes = [(t, q, int(frames[t, q])) for t in range(n_frames) for q in range(3)] + [(n_frames, 0, 5)]
        for t, q, answer in codes:
            row = first + (3 * t + q if kind == "flattened" else t + q)
            ids = list(range(TEXT_AND_SPECIALS + 5 * q, TEXT_AND_SPECIALS + 5 * q + 5)) + ([end] if q == 0 else [])
            logits = weight[ids] @ hidden[line, row - 1]
            expected = expected + torch.nn.functional.cross_entropy(logits[None], torch.tensor([answer]))
            count += 1
    loss = model(found)["speech"]
    assert found.counts["speech"] == count
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


TEXT_AND_SPECIALS = 20 + 64


@pytest.mark.parametrize("kind", ["flattened", "delayed"])
def test_a_code_is_predicted_from_exactly_the_codes_of_earlier_rows(kind: str) -> None:
    """The gradient of each prediction reaches what was read there, and nothing else."""
    n_frames, n_codebooks = 3, 3
    vocabulary, objective = coded_vocabulary(n_codebooks, 5), coded_objectives()[kind]
    model = coded_model(objective, vocabulary)
    sequence = MultimodalSequence.build(
        [text_part([2], Role.CONTEXT), coded_part(frames_of(n_frames, n_codebooks, 5, 0), Role.TARGET)],
        vocabulary,
        model.config.objectives,
    )
    found = corrupt(pack([[sequence]], len(sequence), vocabulary), vocabulary, model.config.objectives)
    looked_up: list[torch.Tensor] = []

    def remember(_: torch.nn.Module, __: object, embeddings: torch.Tensor) -> torch.Tensor:
        looked_up.append(embeddings.detach().requires_grad_())
        return looked_up[0]

    model.interface.embedding.register_forward_hook(remember)
    rows = (found.token_ids, found.modality_ids, found.span_positions, found.position_ids)
    hidden = model.hidden(*rows, found.pattern, coded=found.coded)[0]
    asked = found.predictions["speech"]
    assert asked.codebooks is not None
    logits = model.outputs(hidden[asked.rows], "speech", asked.codebooks)
    for place, (row, codebook) in enumerate(zip(asked.rows.tolist(), asked.codebooks.tolist(), strict=True)):
        (gradient,) = torch.autograd.grad(logits[place, :5].square().sum(), looked_up[0], retain_graph=True)
        reached = gradient[len(sequence) :].abs().sum(-1).view(-1, n_codebooks) > 0
        read = (found.coded["speech"].ids != NOTHING) & (found.coded["speech"].rows[:, None] <= row)
        assert torch.equal(reached, read), (row, codebook)


@pytest.mark.parametrize("kind", ["flattened", "delayed", "parallel"])
def test_rows_are_the_sums_of_their_ids(kind: str) -> None:
    vocabulary, objective = coded_vocabulary(3, 5), coded_objectives()[kind]
    model = coded_model(objective, vocabulary)
    found = corrupt(packed_documents(objective, vocabulary), vocabulary, model.config.objectives)
    given: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model(found)
    table, held = model.interface.embedding.weight, found.coded["speech"]
    expected = table[found.token_ids].flatten(0, 1).clone()
    for row, ids in zip(held.rows.tolist(), held.ids.tolist(), strict=True):
        expected[row] = torch.stack([table[i] for i in ids if i != NOTHING]).sum(0)
    torch.testing.assert_close(given[0].flatten(0, 1), expected)


@pytest.mark.parametrize("kind", ["flattened", "delayed", "parallel"])
def test_packed_documents_have_the_losses_of_each_alone(kind: str) -> None:
    vocabulary, objective = coded_vocabulary(3, 5), coded_objectives()[kind]
    objective = replace(objective, input_dropout=0.4) if isinstance(objective, NextToken) else objective
    model = coded_model(objective, vocabulary)
    objectives = model.config.objectives
    documents = [
        MultimodalSequence.build(
            [text_part([n], Role.CONTEXT), coded_part(frames_of(n, 3, 5, n), Role.TARGET)], vocabulary, objectives, n
        )
        for n in range(5)
    ]
    together = corrupt(pack([documents[:3], documents[3:]], 80, vocabulary), vocabulary, objectives)
    alone = [corrupt(pack([[one]], 30, vocabulary), vocabulary, objectives) for one in documents]
    assert together.counts["speech"] == sum(batch.counts["speech"] for batch in alone) > 0
    torch.testing.assert_close(model(together)["speech"], sum(model(batch)["speech"] for batch in alone))


@given(st.sampled_from(["flattened", "delayed"]), st.integers(0, 2**62))
def test_dropout_hides_codes_one_by_one_and_asks_for_all(kind: str, key: int) -> None:
    vocabulary = coded_vocabulary(3, 5)
    objective = NextToken(input_dropout=0.4, codebooks="delayed" if kind == "delayed" else None)
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    frames = frames_of(20, 3, 5, 0)
    sequence = MultimodalSequence.build([coded_part(frames, Role.TARGET)], vocabulary, objectives, key)
    batch = pack([[sequence]], len(sequence), vocabulary)
    found = corrupt(batch, vocabulary, objectives)
    before, after = batch.coded["speech"].ids, found.coded["speech"].ids
    hidden = after == vocabulary.mask
    assert torch.equal(after[~hidden], before[~hidden])
    assert 8 <= int(hidden.sum()) <= 42  # of 60 at 0.4: five standard deviations
    assert not hidden[before == NOTHING].any()
    asked = found.predictions["speech"]
    assert asked.codebooks is not None
    told = {(int(r) + 1, int(q)): int(a) for r, q, a in zip(asked.rows, asked.codebooks, asked.labels, strict=True)}
    expected = reference_rows(kind, frames.tolist(), vocabulary)
    assert {(1 + row, q) for row, ids in enumerate(expected) for q in ids} == told.keys()
    for row, ids in enumerate(expected):
        for q, i in ids.items():
            choices = [*range(TEXT_AND_SPECIALS + 5 * q, TEXT_AND_SPECIALS + 5 * q + 5), vocabulary.end_of("speech")]
            assert choices[told[1 + row, q]] == i


REFUSED = [
    (1, NextToken(codebooks="delayed"), True, r"model\.objectives\.speech\.codebooks is delayed, .* one codebook"),
    (1, CoarseToFine(block_size=4), True, r"model\.objectives\.speech is coarse_to_fine, .* one codebook"),
    (2, Masked(), True, r"model\.objectives\.speech is masked, .* next_token and coarse_to_fine take"),
    (2, NextToken(codebooks="delayed"), False, r"model\.objectives\.speech: .* spans of one length"),
    (2, CoarseToFine(block_size=4), False, r"model\.objectives\.speech: .* spans of one length"),
    (2, Flow(), True, r"model\.objectives\.speech is flow, but its tokenizer makes codes"),
]


@pytest.mark.parametrize(("n_codebooks", "objective", "free", "told"), REFUSED)
def test_objectives_that_do_not_fit_the_codebooks_are_refused(
    n_codebooks: int, objective: Objective, free: bool, told: str
) -> None:
    vocabulary = Vocabulary(20, {"speech": Discrete(4, n_codebooks)}, ["speech"] if free else [])
    config = ModelConfig(
        decoder=DecoderConfig(dim=12, n_heads=2, n_kv_heads=2), objectives={"text": NextToken(), "speech": objective}
    )
    with pytest.raises(ConfigError, match=told):
        UnifiedModel(config, vocabulary)


def test_codes_on_another_grid_are_refused() -> None:
    vocabulary = coded_vocabulary(3, 5)
    part = Part("speech", Tokens(torch.zeros(6, dtype=torch.int64), (6,)), Role.TARGET)
    with pytest.raises(SequenceError, match=r"grid \(6,\), expected codes of \(T, 3\)"):
        MultimodalSequence.build([part], vocabulary, {"speech": NextToken()})


def test_what_a_vocabulary_without_codebooks_says_is_as_it_was() -> None:
    """The hash of a vocabulary that older models hold."""
    vocabulary = Vocabulary(300, {"image": Discrete(8), "speech": Discrete(6)}, ["speech"])
    assert vocabulary.digest() == "58f773d702dde0913591f091f2697942d99bcd1fefe9fad46e91ce47fdc9bce8"
    assert np.array_equal(vocabulary.to_ids("speech", torch.arange(6)), 300 + 64 + 8 + np.arange(6))
