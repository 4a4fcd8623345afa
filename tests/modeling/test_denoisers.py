"""Cuts of a text: nothing is lost, lengths are known before the cuts are, and their statistics are the papers'."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CODEBOOK, TEXT_SIZE, text_part

from omniform.modeling.config import ConfigError, DecoderConfig, ModelConfig, dump_config, parse_config
from omniform.modeling.corruption import corrupt
from omniform.modeling.denoisers import Denoiser, Given, Middle, Prefix, Spans
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, SequenceError, document_length
from omniform.tokenizers.base import Discrete
from omniform.tokenizers.vocabulary import N_GAPS, Vocabulary

VOCABULARY = Vocabulary(TEXT_SIZE, {"image": Discrete(CODEBOOK)}, modes=["m"])
OBJECTIVES = {"text": NextToken(), "image": NextToken()}
GIVEN = st.sampled_from(["causal", "bidirectional", "learnt"])
RATES = st.floats(0.01, 0.99)
DENOISERS = st.one_of(
    st.builds(Spans, given=GIVEN, rate=RATES, mean_length=st.floats(1, 40)),
    st.builds(Prefix, given=GIVEN, rate=st.none() | RATES),
    st.builds(Middle, given=GIVEN, suffix_first_rate=st.floats(0, 1)),
)
KEYS = st.integers(0, 2**64 - 1)


def cut(denoiser: Denoiser, length: int, key: int) -> list[Part]:
    return denoiser.parts("text", torch.arange(length) % TEXT_SIZE, "m", key)


def put_together(parts: list[Part], n_given: int) -> list[int]:
    """Read a cut text as somebody would who knows no more than the markers, and return it whole."""
    context, fills = parts[:n_given], parts[n_given:]
    first = next(place for place, part in enumerate(context) if part.opening == "mode:m")
    context = context[first:] + context[:first]
    whole = context[0].tokens.codes.tolist()
    for number, fill in enumerate(fills):
        assert fill.opening == f"gap:{number % N_GAPS}"
        whole += fill.tokens.codes.tolist()
        if number + 1 < n_given:
            assert context[number + 1].opening == fill.opening
            whole += context[number + 1].tokens.codes.tolist()
    return whole


@given(DENOISERS, st.integers(2, 400), KEYS)
def test_what_is_given_and_what_fills_its_gaps_are_the_text(denoiser: Denoiser, length: int, key: int) -> None:
    parts = cut(denoiser, length, key)
    n_given = 2 if denoiser.suffix else len(parts) // 2
    assert put_together(parts, n_given) == (torch.arange(length) % TEXT_SIZE).tolist()
    roles = [part.role for part in parts]
    given_role = Role.TARGET if denoiser.given == "learnt" else Role.CONTEXT
    assert roles == [given_role] * n_given + [Role.TARGET] * (len(parts) - n_given)


@given(DENOISERS, st.integers(0, 400), KEYS, KEYS)
def test_rows_are_as_many_whatever_the_key(denoiser: Denoiser, length: int, key: int, other: int) -> None:
    lengths = set()
    for parts in (cut(denoiser, length, key), cut(denoiser, length, other)):
        described = [(part.modality, len(part.tokens.codes), part.role) for part in parts]
        lengths.add(document_length(described, VOCABULARY, OBJECTIVES))
        assert (length < 2) == (not parts)
        if parts:
            assert len(MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES)) == max(lengths)
    assert len(lengths) == 1


@given(st.integers(2, 2000), RATES, st.floats(1, 60), KEYS)
def test_spans_hide_the_rate_in_gaps_of_the_mean_length(length: int, rate: float, mean: float, key: int) -> None:
    gaps = Spans(rate=rate, mean_length=mean).gaps(length, key)
    sizes = [stop - start for start, stop in gaps]
    n_learnt = sum(sizes)
    assert n_learnt == min(max(round(rate * length), 1), length - 1)
    assert len(gaps) == min(max(round(n_learnt / mean), 1), n_learnt, length - n_learnt)
    assert min(sizes) >= 1
    assert gaps[0][0] >= 1
    assert gaps[-1][1] == length
    assert all(after[0] > before[1] for before, after in itertools.pairwise(gaps))


@pytest.mark.parametrize(
    ("denoiser", "length", "n_learnt", "n_gaps"),
    [
        (Spans(rate=0.15, mean_length=3), 512, 77, 26),  # R: 15 % in spans of 3
        (Spans(rate=0.15, mean_length=32), 512, 77, 2),  # X: long spans
        (Spans(rate=0.5, mean_length=3), 512, 256, 85),  # X: half of the text
        (Prefix(rate=0.25), 512, 128, 1),  # S: the last quarter
    ],
)
def test_the_denoisers_of_ul2(denoiser: Denoiser, length: int, n_learnt: int, n_gaps: int) -> None:
    gaps = denoiser.gaps(length, key=5)
    assert (sum(stop - start for start, stop in gaps), len(gaps)) == (n_learnt, n_gaps)


def assert_uniform(found: Counter[tuple[int, ...]], n_outcomes: int) -> None:
    total, share = found.total(), 1 / n_outcomes
    assert len(found) == n_outcomes
    bound = 5 * math.sqrt(total * share * (1 - share))
    assert all(abs(count - total * share) < bound for count in found.values())


def test_all_cuts_are_equally_likely() -> None:
    """Three tokens of six in two gaps: (1, 2) or (2, 1) learnt, (1, 2) or (2, 1) given."""
    spans = Counter(tuple(np.ravel(Spans(rate=0.5, mean_length=1.5).gaps(6, key))) for key in range(4000))
    assert_uniform(spans, 4)
    assert_uniform(Counter(Prefix().gaps(9, key)[0] for key in range(4000)), 8)
    # Two cuts of 0 to 4: on one place in one way, on two in two ways.
    middles = Counter(Middle().gaps(4, key)[0] for key in range(10_000))
    for (start, stop), count in middles.items():
        share = (1 if start == stop else 2) / 25
        assert abs(count - 10_000 * share) < 5 * math.sqrt(10_000 * share)
    assert len(middles) == 15


def test_the_middle_is_a_third_and_the_suffix_comes_first_at_its_rate() -> None:
    n, length = 4000, 20
    sizes = [stop - start for key in range(n) for start, stop in Middle().gaps(length, key)]
    expected = length * (length + 2) / (3 * (length + 1))
    assert abs(np.mean(sizes) - expected) < 5 * np.std(sizes) / math.sqrt(n)
    for rate in (0.0, 0.3, 1.0):
        first = np.mean([Middle(suffix_first_rate=rate).suffix_first(key) for key in range(n)])
        assert abs(first - rate) <= 5 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize(
    ("denoiser", "suffix_first", "expected"),
    [
        (Prefix(given="causal"), False, ["mode:m", 0, 1, "end", "gap:0", 2, 3, 4, "end"]),
        (Middle(), False, ["mode:m", 0, 1, "end", "gap:0", 4, "end", "gap:0", 2, 3, "end"]),
        (Middle(), True, ["gap:0", 4, "end", "mode:m", 0, 1, "end", "gap:0", 2, 3, "end"]),
    ],
)
def test_rows_are_as_documented(denoiser: Denoiser, suffix_first: bool, expected: list[str | int]) -> None:
    codes = torch.arange(5)
    pieces = [codes[:2], codes[4:]] if denoiser.suffix else [codes[:2]]
    fill = replace(text_part([2, 3] if denoiser.suffix else [2, 3, 4], Role.TARGET), opening="gap:0")
    parts = [*denoiser.context("text", pieces, "m", suffix_first=suffix_first), fill]
    sequence = MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES)
    ids = {"end": VOCABULARY.end} | {name: VOCABULARY.begin("text", name) for name in ("mode:m", "gap:0")}
    assert sequence.token_ids.tolist() == [ids[one] if isinstance(one, str) else one for one in expected]
    assert sequence.position_ids[:, 0].tolist() == list(range(len(sequence)))


@given(st.sampled_from([Spans(rate=0.4, mean_length=2), Prefix(), Middle()]), GIVEN, st.integers(2, 12), KEYS)
def test_only_a_prefix_is_read_in_both_directions(denoiser: Denoiser, how: Given, length: int, key: int) -> None:
    parts = cut(replace(denoiser, given=how), length, key)  # type: ignore[type-var]
    sequence = MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES)
    n_given = sum(len(part.tokens.codes) + 2 for part in parts if part.role is Role.CONTEXT)
    n_rows = len(sequence)
    expected = np.tril(np.ones((n_rows, n_rows), dtype=bool))
    if how == "bidirectional":
        expected[:n_given, :n_given] = True
    pattern = pack([[sequence]], n_rows, VOCABULARY).pattern
    assert pattern.allowed()[0].tolist() == expected.tolist()


def test_a_prefix_is_one_block_of_its_own_and_learns_nothing() -> None:
    given_text = replace(text_part([1, 2], Role.CONTEXT), prefix=True)
    parts = [given_text, given_text, text_part([3], Role.CONTEXT), given_text]
    blocks = MultimodalSequence.build(parts, VOCABULARY, OBJECTIVES).block_ids.tolist()
    assert blocks == [0] * 8 + [1, 2, 2] + [3] * 4
    with pytest.raises(SequenceError, match="prefix"):
        MultimodalSequence.build([replace(given_text, role=Role.TARGET)], VOCABULARY, OBJECTIVES)


@pytest.mark.parametrize("how", ["causal", "bidirectional", "learnt"])
@pytest.mark.parametrize("denoiser", [Spans(rate=0.4, mean_length=2), Prefix(), Middle()], ids=lambda d: d.kind)
def test_no_prediction_sees_its_answer(denoiser: Denoiser, how: Given) -> None:
    """Changing what a row has to predict leaves the logits of that row as they were."""
    torch.manual_seed(0)
    decoder = DecoderConfig(dim=24, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=32)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=OBJECTIVES, denoisers={"m": denoiser}), VOCABULARY)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    sequence = MultimodalSequence.build(
        cut(replace(denoiser, given=how), 10, key=3),  # type: ignore[type-var]
        VOCABULARY,
        OBJECTIVES,
    )
    batch = corrupt(pack([[sequence]], len(sequence), VOCABULARY), VOCABULARY, OBJECTIVES)
    asked = batch.predictions["text"]
    assert len(asked.rows) == sum(span.length for span in sequence.spans if span.role is Role.TARGET) > 0

    def hidden(token_ids: torch.Tensor) -> torch.Tensor:
        rows = (batch.modality_ids, batch.span_positions, batch.position_ids)
        return model.hidden(token_ids, *rows, batch.pattern)[0]

    before = hidden(batch.token_ids)
    for row in asked.rows.tolist():
        changed = batch.token_ids.clone()
        changed[0, row + 1] = (changed[0, row + 1] + 1) % TEXT_SIZE
        torch.testing.assert_close(hidden(changed)[row], before[row], atol=1e-6, rtol=0)
        assert (hidden(changed)[row + 1] - before[row + 1]).abs().max() > 1e-3


CONFIG = "objectives: {text: next_token}\ndenoisers:\n"


def test_denoisers_are_configured_by_name_and_share_modes() -> None:
    text = CONFIG + "  r3: {kind: spans, mode: r}\n  r8: {kind: spans, mode: r, mean_length: 8}\n  s: prefix\n"
    config = parse_config(ModelConfig, text)
    assert config.denoisers == {"r3": Spans(mode="r"), "r8": Spans(mode="r", mean_length=8), "s": Prefix()}
    assert config.modes == ("r", "s")
    assert parse_config(ModelConfig, dump_config(config)) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  r: {kind: spans, rate: 1.5}", r"denoisers\.r\.rate: .*less than 1"),
        (
            "  r: {kind: span}",
            r"denoisers\.r: denoiser kind is 'span', expected one of \['middle', 'prefix'",
        ),
        ("  r: {kind: prefix, mean_length: 3}", r"denoisers\.r\.mean_length: unknown key"),
        ("  R-1: prefix", r"denoisers\.R-1.*pattern"),
        ("  a: {kind: spans, mode: r}\n  b: {kind: prefix, mode: r}", "mode r have given: bidirectional, causal"),
    ],
)
def test_a_denoiser_that_cannot_be_used_is_refused_by_its_path(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ModelConfig, CONFIG + line + "\n")
