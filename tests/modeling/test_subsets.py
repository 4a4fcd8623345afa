"""Any-subset masking: budgets are kept, nothing is both given and learnt, and rows see what was given and no more."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CODEBOOK, SPEECH_CODEBOOK, TEXT_SIZE, four_modalities

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, dump_config, parse_config
from omniform.modeling.corruption import CorruptedBatch, corrupt
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Role
from omniform.modeling.subsets import AnySubset, Contents, lay_out, n_rows_of
from omniform.tokenizers.base import Tokens

VOCABULARY = four_modalities()
OBJECTIVES = {"text": NextToken(), "image": Masked(), "speech": NextToken(), "video": Masked()}
NAMES = list(OBJECTIVES)
SIZES = {"text": TEXT_SIZE, "image": CODEBOOK, "speech": SPEECH_CODEBOOK, "video": CODEBOOK}
KEYS = st.integers(0, 2**64 - 1)
ALPHAS = st.sampled_from([0.001, 0.05, 0.5, 1.0, 10.0])


def budgets(low: int) -> st.SearchStrategy[Any]:
    ranges = st.tuples(st.integers(low, 30), st.integers(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    return st.integers(low, 60) | ranges


SUBSETS = st.builds(
    AnySubset,
    input_budget=budgets(0),
    target_budget=budgets(1),
    input_alpha=ALPHAS | st.dictionaries(st.sampled_from(NAMES), ALPHAS | st.just(0.0)),
    target_alpha=ALPHAS | st.dictionaries(st.sampled_from(NAMES), ALPHAS, min_size=1),
)


@st.composite
def items_of(draw: st.DrawFn, least: int = 1) -> dict[str, Tokens]:
    """One item of each of some modalities, in any order."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=least, unique=True))
    grids = {name: {"image": (2, 2), "video": (2, 2, 2)}.get(name) or (draw(st.integers(0, 6)),) for name in names}
    found = {}
    for name, grid in grids.items():
        n = math.prod(grid)
        codes = draw(st.lists(st.integers(0, SIZES[name] - 1), min_size=n, max_size=n))
        found[name] = Tokens(torch.tensor(codes, dtype=torch.int64), grid)
    return found


def high(budget: int | tuple[int, int]) -> int:
    return budget if isinstance(budget, int) else budget[1]


def alpha_of(alpha: float | Mapping[str, float], name: str) -> float:
    return alpha.get(name, 0.0) if isinstance(alpha, Mapping) else alpha


@given(SUBSETS, st.dictionaries(st.sampled_from(NAMES), st.integers(1, 40), min_size=1), KEYS)
def test_budgets_are_kept_and_something_is_learnt(subset: AnySubset, sizes: dict[str, int], key: int) -> None:
    if not subset.learns(sizes):
        return
    counts = subset.counts(sizes, key)
    assert counts == subset.counts(sizes, key)
    given_, learnt = (sum(pair[side] for pair in counts.values()) for side in (0, 1))
    assert given_ <= high(subset.input_budget)
    assert 1 <= learnt <= high(subset.target_budget)
    for name, (n_given, n_learnt) in counts.items():
        assert min(n_given, n_learnt) >= 0
        assert n_given + n_learnt <= sizes[name]
        assert not n_given or alpha_of(subset.input_alpha, name)
        assert not n_learnt or alpha_of(subset.target_alpha, name)
    assert n_rows_of(counts) <= subset.longest(sizes)


def test_what_is_learnt_where_the_draws_leave_nothing() -> None:
    everything = AnySubset(input_budget=1000, target_budget=10)
    assert everything.counts({"text": 5}, key=1) == {"text": (4, 1)}
    # The inputs take all of the text, so the one that has tokens to spare learns, whatever its share.
    only_text = AnySubset(input_budget=9, target_budget=1, input_alpha={"text": 1})
    found = {tuple(only_text.counts({"text": 9, "image": 4}, key).items()) for key in range(20)}
    assert found == {(("text", (9, 0)), ("image", (0, 1)))}


@pytest.mark.parametrize("alphas", [(0.01, 0.02, 0.03), (0.5, 0.5, 0.5), (1.0, 10.0, 4.0), (1000.0, 1.0, 0.1)])
def test_shares_have_the_moments_of_a_dirichlet_distribution(alphas: tuple[float, ...]) -> None:
    n, budget = 3000, 100_000
    names = NAMES[: len(alphas)]
    concentrations = dict(zip(names, alphas, strict=True))
    subset = AnySubset(
        input_budget=budget, target_budget=budget, input_alpha=concentrations, target_alpha=concentrations
    )
    sizes = dict.fromkeys(names, 10 * budget)
    counts = [subset.counts(sizes, key) for key in range(n)]
    total = sum(alphas)
    for side, (name, alpha) in itertools.product((0, 1), concentrations.items()):
        shares = np.array([one[name][side] for one in counts]) / budget
        mean, second = alpha / total, alpha * (alpha + 1) / (total * (total + 1))
        deviation = math.sqrt(second - mean**2)
        assert abs(shares.mean() - mean) < 5 * deviation / math.sqrt(n) + 2 / budget
        assert abs((shares**2).mean() - second) < 5 * 0.5 / math.sqrt(n)


def test_budgets_are_uniform_and_other_keys_draw_others() -> None:
    subset = AnySubset(input_budget=(3, 6), target_budget=5)
    found = Counter(subset.counts({"text": 50}, key)["text"][0] for key in range(4000))
    assert set(found) == {3, 4, 5, 6}
    assert all(abs(count - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75) for count in found.values())


def test_every_place_is_given_and_learnt_alike() -> None:
    whole = Contents.whole("image", Tokens(torch.arange(4), (2, 2)), VOCABULARY)
    cuts = [whole.cut(1, 2, OBJECTIVES["image"], key) for key in range(4000)]
    found = Counter((*cut.given.tolist(), *cut.asked.tolist()) for cut in cuts)
    assert len(found) == 12
    assert all(abs(count - 4000 / 12) < 5 * math.sqrt(4000 / 12 * 11 / 12) for count in found.values())


def rows_by_place(sequence: MultimodalSequence, role: Role) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Return (id, coordinates) of each content row of a role, by modality and place in its item."""
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for span in sequence.spans:
        if span.role is not role:
            continue
        for row in range(span.start, span.start + span.length):
            at = (span.modality, int(sequence.span_positions[row]))
            assert at not in found
            found[at] = (int(sequence.token_ids[row]), *sequence.position_ids[row].tolist())
    return found


@given(SUBSETS, items_of(), KEYS)
def test_rows_are_those_of_the_whole_items(subset: AnySubset, items: dict[str, Tokens], key: int) -> None:
    if not subset.learns(items):
        return
    sequence = subset.document(items, VOCABULARY, OBJECTIVES, key)
    whole = lay_out([Contents.whole(name, t, VOCABULARY) for name, t in items.items()], VOCABULARY, OBJECTIVES)
    sizes = {name: len(t) + (VOCABULARY.end_of(name) is not None) for name, t in items.items()}
    assert len(sequence) == n_rows_of(subset.counts(sizes, key))
    everything = rows_by_place(whole, Role.CONTEXT)
    assert len(everything) == sum(sizes.values())
    known, asked = (rows_by_place(sequence, role) for role in (Role.CONTEXT, Role.TARGET))
    assert not known.keys() & asked.keys()
    assert asked
    assert (known | asked).items() <= everything.items()
    for name in items:
        if not OBJECTIVES[name].bidirectional:
            places = [at for modality, at in (*known, *asked) if modality == name]
            assert places == list(range(1, len(places) + 1))
    again = subset.document(items, VOCABULARY, OBJECTIVES, key)
    assert again.token_ids.tolist() == sequence.token_ids.tolist()


def test_a_document_is_laid_out_as_documented() -> None:
    text = Contents.whole("text", Tokens(torch.tensor([7, 8]), (2,)), VOCABULARY)
    image = Contents.whole("image", Tokens(torch.arange(4), (2, 2)), VOCABULARY)
    text = dataclasses.replace(text, given=np.array([0]), asked=np.array([1, 2]))
    image = dataclasses.replace(image, given=np.array([0, 3]), asked=np.array([1, 2]))
    sequence = lay_out([image, text], VOCABULARY, OBJECTIVES)
    c = VOCABULARY.to_ids("image", torch.arange(4)).tolist()
    begin_image, begin_text = VOCABULARY.begin("image"), VOCABULARY.begin("text")
    assert sequence.token_ids.tolist() == [
        *(begin_image, c[0], c[3], begin_text, 7),
        *(begin_image, c[1], c[2]),
        *(begin_text, 8, VOCABULARY.end),
    ]
    corners = {0: (1, 1, 1), 1: (1, 1, 2), 2: (1, 2, 1), 3: (1, 2, 2)}
    assert [tuple(p) for p in sequence.position_ids.tolist()] == [
        *((0, 0, 0), corners[0], corners[3], (0, 0, 0), (1, 1, 1)),
        *((0, 0, 0), corners[1], corners[2]),
        *((1, 1, 1), (2, 2, 2), (3, 3, 3)),
    ]
    assert sequence.span_positions.tolist() == [0, 1, 4, 0, 1, 0, 2, 3, 1, 2, 3]
    assert sequence.block_ids.tolist() == [0] * 5 + [1] * 3 + [2] * 3
    assert sequence.private.tolist() == [False] * 5 + [True] * 6
    assert sequence.bidirectional.tolist() == [True] * 8 + [False] * 3


def test_a_marker_after_a_prefix_stands_where_the_prefix_ends_on_any_grid() -> None:
    causal: dict[str, Objective] = {**OBJECTIVES, "image": NextToken()}
    image = Contents.whole("image", Tokens(torch.arange(4), (2, 2)), VOCABULARY)
    image = dataclasses.replace(image, given=np.arange(3), asked=np.array([3]))
    sequence = lay_out([image], VOCABULARY, causal)
    assert sequence.position_ids.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 1], [1, 2, 2]]
    assert sequence.span_positions.tolist() == [0, 1, 2, 3, 3, 4]


@given(SUBSETS, items_of(), KEYS)
def test_rows_see_what_is_given_and_their_own_block(subset: AnySubset, items: dict[str, Tokens], key: int) -> None:
    if not subset.learns(items):
        return
    sequence = subset.document(items, VOCABULARY, OBJECTIVES, key)
    owner: list[tuple[Role, str]] = []
    for span in sequence.spans:
        owner += [(span.role, span.modality)] * (1 + span.length)
    allowed = pack([[sequence]], len(sequence), VOCABULARY).pattern.allowed()[0]
    for q, (asker, of) in enumerate(owner):
        for k, (asked, what) in enumerate(owner):
            if asked is Role.CONTEXT:
                expected = True  # everything that is given, whoever asks
            elif asker is Role.CONTEXT or of != what:
                expected = False
            else:
                expected = OBJECTIVES[of].bidirectional or k <= q
            assert bool(allowed[q, k]) == expected


@pytest.fixture(scope="module")
def model() -> UnifiedModel:
    """Random weights, large enough for attention to matter."""
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, ffn_dim=32, rope_theta=100.0)
    torch.manual_seed(0)
    config = ModelConfig(
        decoder=decoder,
        objectives=OBJECTIVES,
        subsets={"any": AnySubset(input_budget=10, target_budget=10)},
        position_embeddings={"image": 4, "video": 8},
    )
    found = UnifiedModel(config, VOCABULARY)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return found.eval()


def corrupted(rows: list[list[MultimodalSequence]], length: int) -> CorruptedBatch:
    return corrupt(pack(rows, length, VOCABULARY), VOCABULARY, OBJECTIVES)


@torch.no_grad()
def hidden_of(model: UnifiedModel, sequence: MultimodalSequence) -> torch.Tensor:
    batch = corrupted([[sequence]], len(sequence))
    rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
    return model.hidden(*rows, batch.pattern)[0]


@given(SUBSETS, items_of(), KEYS)
def test_all_that_is_asked_in_place_is_hidden_and_counts(subset: AnySubset, items: dict[str, Tokens], key: int) -> None:
    if not subset.learns(items):
        return
    sequence = subset.document(items, VOCABULARY, OBJECTIVES, key)
    batch = corrupted([[sequence]], len(sequence))
    for name in NAMES:
        spans = [span for span in sequence.spans if span.modality == name and span.role is Role.TARGET]
        asked = batch.predictions[name]
        assert asked.count == sum(span.length for span in spans)
        for span in spans:
            rows = np.arange(span.start, span.start + span.length)
            labels = sequence.token_ids[rows] - VOCABULARY.target_range(name).start
            assert asked.labels.tolist() == labels.tolist()
            assert asked.rows.tolist() == (rows + OBJECTIVES[name].shift).tolist()
            assert asked.weights.tolist() == [1.0] * len(rows)
            if OBJECTIVES[name].corrupts:
                assert set(batch.token_ids[0, rows].tolist()) == {VOCABULARY.mask}


def other_id(sequence: MultimodalSequence, row: int, modality: str) -> MultimodalSequence:
    ids = VOCABULARY.target_range(modality)
    token_ids = sequence.token_ids.copy()
    token_ids[row] = ids.start + (token_ids[row] - ids.start + 1) % (len(ids) - 1)
    return dataclasses.replace(sequence, token_ids=token_ids)


@settings(max_examples=40)
@given(items_of(least=2), KEYS, st.data())
def test_an_answer_reaches_nothing_but_what_follows_it_in_its_own_block(
    model: UnifiedModel, items: dict[str, Tokens], key: int, data: st.DataObject
) -> None:
    sequence = AnySubset(input_budget=8, target_budget=12).document(items, VOCABULARY, OBJECTIVES, key)
    span = data.draw(st.sampled_from(sequence.spans))
    row = data.draw(st.integers(span.start, span.start + span.length - 1))
    before = hidden_of(model, sequence)
    after = hidden_of(model, other_id(sequence, row, span.modality))
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    if span.role is Role.CONTEXT:
        assert set(changed) == set(range(len(sequence)))
    elif OBJECTIVES[span.modality].corrupts:
        assert changed == []
    else:
        assert changed == list(range(row, span.start + span.length))


@settings(max_examples=25)
@given(items_of(least=2), KEYS)
def test_the_order_of_modalities_changes_nothing(model: UnifiedModel, items: dict[str, Tokens], key: int) -> None:
    subset = AnySubset(input_budget=8, target_budget=12)
    whole = {name: Contents.whole(name, tokens, VOCABULARY) for name, tokens in items.items()}
    counts = subset.counts({name: len(item.token_ids) for name, item in whole.items()}, key)
    cut = [item.cut(*counts[name], OBJECTIVES[name], key) for name, item in whole.items()]
    states = []
    for order in (cut, cut[::-1]):
        sequence = lay_out(order, VOCABULARY, OBJECTIVES)
        spans = sorted(sequence.spans, key=lambda span: (span.role, span.modality))
        hidden = hidden_of(model, sequence)
        states.append(torch.cat([hidden[span.start - 1 : span.start + span.length] for span in spans]))
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(st.lists(items_of(), min_size=2, max_size=4), KEYS)
def test_packed_documents_have_the_losses_that_they_have_alone(
    model: UnifiedModel, documents: list[dict[str, Tokens]], key: int
) -> None:
    subset = AnySubset(input_budget=(0, 12), target_budget=12)
    built = [
        subset.document(items, VOCABULARY, OBJECTIVES, (key + number) % 2**64) for number, items in enumerate(documents)
    ]
    half = len(built) // 2
    rows = [built[:half], built[half:]]
    with torch.no_grad():
        together = model(corrupted(rows, max(sum(map(len, row)) for row in rows)))
        alone = [model(corrupted([[one]], len(one))) for one in built]
    for name in NAMES:
        expected = torch.stack([losses[name] for losses in alone]).sum()
        torch.testing.assert_close(together[name], expected, atol=1e-4, rtol=1e-5)


@settings(max_examples=15)
@given(st.lists(st.integers(0, TEXT_SIZE - 1), max_size=6))
def test_a_text_from_nothing_has_the_logits_of_plain_text(model: UnifiedModel, codes: list[int]) -> None:
    text = Contents.whole("text", Tokens(torch.tensor(codes, dtype=torch.int64), (len(codes),)), VOCABULARY)
    sequence = lay_out([dataclasses.replace(text, given=text.asked, asked=text.given)], VOCABULARY, OBJECTIVES)
    found = model.logits(hidden_of(model, sequence)[1:-1], VOCABULARY.target_range("text"))[:, :TEXT_SIZE]
    if codes:
        expected = model.text_logits(torch.tensor([codes]))[0, :, :TEXT_SIZE]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


CONFIG = """
objectives: {{text: next_token, image: {image}}}
subsets: {{any: {subset}}}
{rest}
"""
PLAIN = "{input_budget: [0, 8], target_budget: 8, input_alpha: {text: 1}, target_alpha: 0.5}"


def test_a_configuration_with_subsets_is_read_and_written() -> None:
    config = parse_config(ModelConfig, CONFIG.format(image="masked", subset=PLAIN, rest=""))
    assert config.subsets["any"].input_budget == (0, 8)
    assert parse_config(ModelConfig, dump_config(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": "{input_budget: 8, target_budget: 0}"}, r"subsets\.any: target_budget is 0, expected at least 1"),
        ({"subset": "{input_budget: [8, 4], target_budget: 2}"}, r"input_budget is \[8, 4\], expected the lower"),
        ({"subset": "{input_budget: -1, target_budget: 2}"}, r"subsets\.any\.input_budget"),
        ({"subset": "{input_budget: 1, target_budget: 2, input_alpha: -1}"}, r"subsets\.any\.input_alpha"),
        ({"subset": "{input_budget: 1, target_budget: 2, target_alpha: 0}"}, "target_alpha is 0.0, expected one above"),
        ({"subset": "{input_budget: 1, target_budget: 2, input_alpha: {sound: 1}}"}, "concentration for sound, but"),
        ({"image": "flow"}, r"objectives\.image: kind is flow, expected masked or next_token"),
        ({"image": "{kind: masked, block_size: 4}"}, r"objectives\.image: block_size is 4, expected none"),
        ({"image": "{kind: masked, masking: independent}"}, r"objectives\.image: masking is independent and weighting"),
        ({"rest": "denoisers: {s: prefix}"}, "denoisers is given with subsets"),
        ({"rest": "next_span_weight: 0.1"}, "next_span_weight is given with subsets"),
    ],
)
def test_a_configuration_that_cannot_be_learnt_is_refused(changes: dict[str, str], message: str) -> None:
    given_ = {"image": "masked", "subset": PLAIN, "rest": "", **changes}
    with pytest.raises(ConfigError, match=message):
        parse_config(ModelConfig, CONFIG.format(**given_))


def test_spans_that_end_themselves_are_not_asked_all_at_once(model: UnifiedModel) -> None:
    config = dataclasses.replace(model.config, objectives={**OBJECTIVES, "speech": Masked()})
    with pytest.raises(ConfigError, match=r"model\.objectives\.speech is masked beside model\.subsets"):
        UnifiedModel(config, VOCABULARY)
