"""Speech of several codes a frame that is generated: its cache is exact, what is drawn is what was asked, and what was
learnt comes back under every layout."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from coded_speech import (
    BLOCK,
    GRIDS,
    TEXT_SIZE,
    codebooks_of,
    coded_model,
    coded_objectives,
    coded_part,
    coded_vocabulary,
    frames_of,
    speech_session,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import text_part

from omniform.inference.engine import Engine
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Session
from omniform.modeling.codebooks import CodedRows
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import CodedObjective, Objective
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role, document_length
from omniform.tokenizers.base import Tokens

KINDS = ["flattened", "delayed", "parallel"]
Q, SIZE = 3, 5
MODELS: dict[str, UnifiedModel] = {}


def model_of(kind: str) -> UnifiedModel:
    """A model of random weights with a layout; spans of speech end now and then."""
    if kind not in MODELS:
        MODELS[kind] = coded_model(coded_objectives()[kind], coded_vocabulary(Q, SIZE))
    return MODELS[kind]


def drain(model: UnifiedModel, sessions: Sequence[Session]) -> list[list[list[int]]]:
    for _ in Engine(model, GRIDS).run(sessions):
        pass
    return [[tokens.codes.tolist() for tokens in session.generated] for session in sessions]


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_room_holds_a_frame(kind: str) -> None:
    """In as many rows as the shortest span that holds anything takes there is a frame, unless it ends at once."""
    model = model_of(kind)
    codebooks = codebooks_of(coded_objectives()[kind], model.vocabulary)
    lengths = set()
    for seed in range(8):
        session = speech_session([text_part([1, 2], Role.CONTEXT)], SamplingSettings(), seed=seed)
        session.plan = replace(session.plan, max_rows=1 + 2 + 1 + 1 + codebooks.n_rows(Q))
        [[codes]] = drain(model, [session])
        lengths.add(len(codes))
    assert Q in lengths <= {0, Q}


@settings(max_examples=50)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 8),
    st.integers(2, 4),
    st.integers(1, 6),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_what_training_shows_is_what_generation_makes_and_reads(
    kind: str, n_frames: int, n_codebooks: int, size: int, more: int, seed: int
) -> None:
    """A model that says the truth: through the session's rows and back, whole where there is room."""
    vocabulary, objective = coded_vocabulary(n_codebooks, size), coded_objectives()[kind]
    codebooks, frames = codebooks_of(objective, vocabulary), frames_of(n_frames, n_codebooks, size, seed)
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    session = speech_session([], SamplingSettings(max_new_tokens=1 + more))
    session.open_span(None, vocabulary, objectives)
    truth = codebooks.arrange(frames)
    truth = torch.cat([truth, truth[-1:].expand(30, -1)])
    while session.span:
        state, (rows,), asked = session.span.state, session.step_rows(vocabulary), session.asked()
        assert asked is not None
        if objective.commits and state.step:
            assert torch.equal(rows.coded["speech"].ids, state.token_ids[-1:])
        first = state.step if objective.commits else state.n_final
        choices = vocabulary.to_choices("speech", truth[first + asked.rows, asked.codebooks], asked.codebooks)
        logits = 20.0 * torch.nn.functional.one_hot(choices, size + 1).float()
        made = session.advance([logits], vocabulary).state.token_ids
    (tokens,) = session.generated
    assert isinstance(tokens, Tokens)
    n_whole = min(n_frames, codebooks.layout.n_frames(1 + more))
    assert tokens.grid == (n_whole, n_codebooks)
    assert torch.equal(tokens.codes.view(tokens.grid), frames[:n_whole])
    if objective.commits:  # what the cache holds of the span is how the part that it became begins
        assert torch.equal(made, codebooks.arrange(frames[:n_whole])[: len(made)])


@torch.no_grad()
def uncached(
    model: UnifiedModel, contexts: Sequence[Sequence[Part]], to: Sequence[str], chosen: SamplingSettings, seed: int
) -> list[list[int]]:
    """Generate without cache or batch: every step forwards whole documents, and reads the rows that it is about."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    documents, generated = [list(context) for context in contexts], []
    for number, modality in enumerate(to):
        objective, draw = objectives[modality], KeyedDraw(seed, 0, number, chosen)
        assert isinstance(objective, CodedObjective)
        coded = modality == "speech"
        codebooks = codebooks_of(objective, vocabulary) if coded else None
        n = chosen.max_new_tokens
        if codebooks is None:
            state = objective.begin(n, chosen.steps, vocabulary.mask)
            unknown = text_part([0] * n, Role.CONTEXT)
        else:
            state = objective.begin_coded(n, chosen.steps, vocabulary.mask, codebooks)
            unknown = coded_part(torch.zeros(codebooks.layout.n_frames(n), Q, dtype=torch.int64), Role.CONTEXT)
        while not state.done:
            asked, outputs = objective.asked(state) if coded else None, []
            for parts in documents:
                layout = MultimodalSequence.build([*parts, unknown], vocabulary, objectives)
                first = (
                    document_length([(p.modality, len(p.tokens), p.role) for p in parts], vocabulary, objectives) + 1
                )
                rows = state.token_ids
                token_ids, held = layout.token_ids.copy(), layout.coded
                if coded:
                    own = held["speech"]
                    places = torch.searchsorted(own.rows, first + torch.arange(len(rows)))
                    held = {"speech": CodedRows(own.rows, own.ids.index_copy(0, places, rows))}
                else:
                    token_ids[first : first + len(rows)] = rows.numpy()
                # Causal spans stop at the newest row; of blocks those behind are private to later ones.
                layout = replace(layout, token_ids=token_ids, coded=held)
                block = len(rows) if objective.commits else min(state.n_final + BLOCK, len(rows))
                layout = layout.cut(0, first + block)
                batch = pack([[layout]], len(layout), vocabulary)
                given_rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
                hidden = model.hidden(*given_rows, batch.pattern, coded=batch.coded)[0]
                read = hidden[-1:] if objective.commits else hidden[first + state.n_final :]
                if asked is None:
                    outputs.append(model.outputs(read, modality))
                else:
                    outputs.append(model.outputs(read[asked.rows], modality, asked.codebooks))
            guided = outputs[0] if len(outputs) == 1 else objective.guide(*outputs, chosen.guidance_scale)
            ids, end = vocabulary.target_range(modality), vocabulary.end_of(modality)
            state = objective.step(state, guided, ids.start, end, vocabulary.mask, draw)
        if codebooks is not None:
            frames = codebooks.restore(state.token_ids)
            documents[0].append(coded_part(frames, Role.CONTEXT))
            generated.append(frames.flatten().tolist())
        else:
            codes = [i for i in state.token_ids.tolist() if i != vocabulary.end]
            documents[0].append(text_part(codes, Role.CONTEXT))
            generated.append(codes)
    return generated


PROMPTS = st.lists(
    st.one_of(
        st.lists(st.integers(0, TEXT_SIZE - 1), max_size=3).map(lambda codes: text_part(codes, Role.CONTEXT)),
        st.tuples(st.integers(0, 5), st.integers(0, 99)).map(
            lambda drawn: coded_part(frames_of(drawn[0], Q, SIZE, drawn[1]), Role.CONTEXT)
        ),
    ),
    max_size=2,
)
SETTINGS = st.builds(
    SamplingSettings,
    max_new_tokens=st.integers(1, 11),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([None, 3]),
    top_p=st.sampled_from([None, 0.8]),
    guidance_scale=st.sampled_from([1.0, 2.5]),
    steps=st.sampled_from([None, 1, 4]),
)
TARGETS = st.lists(st.sampled_from(["speech", "speech", "text"]), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(prompts=st.lists(st.tuples(PROMPTS, TARGETS, SETTINGS, st.integers(0, 2**62)), min_size=1, max_size=3))
def test_cached_batched_codes_equal_the_uncached_ones(
    kind: str, prompts: list[tuple[list[Part], list[str], SamplingSettings, int]]
) -> None:
    model, sessions, expected = model_of(kind), [], []
    for context, to, chosen, seed in prompts:
        sessions.append(speech_session(context, chosen, to, seed=seed))
        branches = [context, []] if chosen.guidance_scale != 1 else [context]
        expected.append(uncached(model, branches, to, chosen, seed))
    assert drain(model, sessions) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**62), chosen=SETTINGS.map(lambda s: replace(s, temperature=1e6, top_p=None)))
def test_no_draw_leaves_the_codebook_that_it_is_for(kind: str, seed: int, chosen: SamplingSettings) -> None:
    """At a temperature that makes all codes alike; `Vocabulary.to_codes` refuses those of other codebooks."""
    model = model_of(kind)
    one = speech_session([text_part([seed % TEXT_SIZE], Role.CONTEXT)], chosen, ("speech", "speech"), seed=seed)
    drain(model, [one])
    layout = codebooks_of(coded_objectives()[kind], model.vocabulary).layout
    for tokens in one.generated:
        assert isinstance(tokens, Tokens)
        assert tokens.grid[1] == Q
        assert layout.n_steps(tokens.grid[0]) <= chosen.max_new_tokens
        assert tokens.codes.numel() == 0 or 0 <= int(tokens.codes.min()) <= int(tokens.codes.max()) < SIZE


@pytest.mark.parametrize("kind", ["flattened", "delayed"])
def test_codes_are_drawn_from_the_product_of_their_conditionals(kind: str) -> None:
    """Two frames of two codebooks of two codes, each code with a table of its own given the code of its codebook before
    it and, where it is in an earlier row, the first code of its frame: against every outcome, one by one."""
    vocabulary, objective = coded_vocabulary(2, 2), coded_objectives()[kind]
    objectives: dict[str, Objective] = {"text": NextToken(), "speech": objective}
    codebooks = codebooks_of(objective, vocabulary)
    table = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(5))
    table[1, ..., 2] = -torch.inf  # the second codebook has no end

    def conditional(frames: dict[tuple[int, int], int], t: int, q: int) -> torch.Tensor:
        return table[q, frames.get((t - 1, q), 2), frames[t, 0] if q else 2].log_softmax(-1)

    expected: dict[tuple[tuple[int, int], ...], float] = {}
    for length in range(3):
        for codes in itertools.product(range(2), repeat=2 * length):
            frames = {divmod(place, 2): code for place, code in enumerate(codes)}
            total = sum(float(conditional(frames, t, q)[code]) for (t, q), code in frames.items())
            if length < 2:
                total += float(conditional(frames, length, 0)[2])
            expected[tuple(itertools.pairwise(codes))[::2]] = float(torch.tensor(total).exp())
    assert sum(expected.values()) == pytest.approx(1)

    found: Counter[tuple[tuple[int, int], ...]] = Counter()
    n = 400
    for seed in range(n):
        session = speech_session([], SamplingSettings(max_new_tokens=codebooks.layout.n_steps(2)), seed=seed)
        session.open_span(None, vocabulary, objectives)
        while session.span:
            state, asked = session.span.state, session.asked()
            assert asked is not None
            of_steps = codebooks.layout.frames(2).tolist()
            known = {
                (of_steps[row][q], q): int(vocabulary.to_choices("speech", ids[q : q + 1], torch.tensor([q])))
                for row, ids in enumerate(state.token_ids)
                for q in range(2)
                if of_steps[row][q] >= 0 and ids[q] >= 0
            }
            session.advance(
                [torch.stack([conditional(known, of_steps[state.step][q], q) for q in asked.codebooks.tolist()])],
                vocabulary,
            )
        (tokens,) = session.generated
        assert isinstance(tokens, Tokens)
        found[tuple(map(tuple, tokens.codes.view(tokens.grid).tolist()))] += 1
    assert found.keys() <= expected.keys()
    # Outcomes of which few are expected count together.
    common = [outcome for outcome, p in expected.items() if n * p >= 5]
    pairs = [(found[outcome], n * expected[outcome]) for outcome in common]
    rare = (n - sum(seen for seen, _ in pairs), n - sum(wanted for _, wanted in pairs))
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in [*pairs, rare])
    assert len(common) >= 8
    assert chi_square < len(common) + 4 * (2 * len(common)) ** 0.5  # four standard deviations above its mean


LENGTHS = (0, 1, 2, 3, 4, 5, 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_said_and_understood_under_every_layout(kind: str) -> None:
    """Texts to words of several lengths and back; of words that take more than one block too."""
    vocabulary = coded_vocabulary(Q, SIZE)
    words = [frames_of(n, Q, SIZE, place) for place, n in enumerate(LENGTHS)]
    objectives: dict[str, Objective] = {
        "text": NextToken(),
        "speech": coded_objectives(choice_temperature=0)[kind],
    }
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    torch.manual_seed(0)
    model = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives), vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    # Of a word only one level is learnt at a time: it is shown more often.
    n_shown = 3 if kind == "parallel" else 1
    for step in range(110 if kind == "parallel" else 70):
        documents = [[coded_part(words[place], Role.CONTEXT), text_part([place], Role.TARGET)] for place in range(1, 8)]
        documents += [
            [text_part([place], Role.CONTEXT), coded_part(words[place], Role.TARGET)] for place in range(8)
        ] * n_shown
        sequences = [
            MultimodalSequence.build(parts, vocabulary, objectives, noise_key=step * 100 + number)
            for number, parts in enumerate(documents)
        ]
        batch = pack([[s] for s in sequences], max(map(len, sequences)), vocabulary)
        corrupted = corrupt(batch, vocabulary, objectives)
        losses = model(corrupted)
        loss = sum(losses[name] / corrupted.counts[name] for name in ("text", "speech"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = SamplingSettings(temperature=0, max_new_tokens=20)
    to_speech = [speech_session([text_part([place], Role.CONTEXT)], chosen) for place in range(len(words))]
    to_text = [speech_session([coded_part(word, Role.CONTEXT)], chosen, ("text",)) for word in words[1:]]
    assert drain(model.eval(), to_speech) == [[word.flatten().tolist()] for word in words]
    assert drain(model, to_text) == [[[place]] for place in range(1, len(words))]
