"""Generation with the cache, in batches, against a slow reference that forwards whole sequences one at a time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import (
    CODEBOOK,
    SPEECH_CODEBOOK,
    TEXT_SIZE,
    four_modalities,
    image_part,
    speech_part,
    text_part,
    video_part,
)

from omniform.inference.cache import KVCache
from omniform.inference.engine import Engine
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Plan, Session
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.config import ModelConfig, TopK
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Tokens
from omniform.tokenizers.vocabulary import Vocabulary

GRIDS: dict[str, tuple[int, ...] | None] = {"text": None, "image": (2, 2), "speech": None, "video": (2, 2, 2)}
CONTEXT_TEXT = st.lists(st.integers(0, TEXT_SIZE - 1), max_size=5).map(lambda codes: text_part(codes, Role.CONTEXT))
CONTEXT_IMAGE = st.lists(st.integers(0, CODEBOOK - 1), min_size=4, max_size=4).map(
    lambda codes: image_part(codes, Role.CONTEXT)
)
CONTEXT_SPEECH = st.lists(st.integers(0, SPEECH_CODEBOOK - 1), max_size=5).map(
    lambda codes: speech_part(codes, Role.CONTEXT)
)
CONTEXT_VIDEO = st.lists(st.integers(0, CODEBOOK - 1), min_size=8, max_size=8).map(
    lambda codes: video_part(codes, Role.CONTEXT)
)
CONTEXTS = st.lists(st.one_of(CONTEXT_TEXT, CONTEXT_IMAGE, CONTEXT_SPEECH, CONTEXT_VIDEO), max_size=3)
TARGETS = st.lists(st.sampled_from(list(GRIDS)), min_size=1, max_size=3)
SETTINGS = st.builds(
    SamplingSettings,
    max_new_tokens=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([None, 3]),
    top_p=st.sampled_from([None, 0.8]),
    guidance_scale=st.sampled_from([1.0, 2.5]),
    steps=st.sampled_from([None, 1, 2, 4]),
)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return four_modalities()


@pytest.fixture(
    params=[("shared", "pre"), ("modality", "pre"), (TopK(n=4, k=2), "hybrid")], ids=["shared", "modality", "topk"]
)
def model_config(model_config: ModelConfig, request: pytest.FixtureRequest) -> ModelConfig:
    experts, norm = request.param
    return replace(
        model_config,
        decoder=replace(model_config.decoder, experts=experts, norm=norm),
        objectives={**model_config.objectives, "speech": NextToken(), "video": Masked(steps=2)},
        position_embeddings={} if experts == "shared" else {"image": 4, "video": 8},
    )


def reference_logits(model: UnifiedModel, parts: Sequence[Part], target: Part, ids: torch.Tensor) -> torch.Tensor:
    """Forward a whole document, its last span holding `ids` so far, and return the logits of the step's rows."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    sequence = MultimodalSequence.build([*parts, target], vocabulary, objectives)
    span, objective = sequence.spans[-1], objectives[target.modality]
    token_ids = sequence.token_ids.copy()
    token_ids[span.start : span.start + len(ids)] = ids.numpy()
    stop = span.start + len(ids)
    batch = pack([[sequence]], len(sequence), vocabulary)
    given = (torch.from_numpy(token_ids)[None], batch.modality_ids, batch.span_positions, batch.position_ids)
    hidden = model.hidden(*given, batch.pattern)[0]
    rows = hidden[stop - 1 : stop] if objective.commits else hidden[span.start : stop]
    return model.logits(rows, vocabulary.target_range(target.modality))


@torch.no_grad()
def reference_generate(
    model: UnifiedModel,
    contexts: Sequence[Sequence[Part]],
    to: Sequence[str],
    chosen: SamplingSettings,
    seed: int,
    earlier_role: Role,
) -> list[list[int]]:
    """Generate without cache or batch; earlier spans stand as `earlier_role`: TARGET keeps their noised copies."""
    vocabulary, objectives = model.vocabulary, model.config.objectives
    documents = [list(context) for context in contexts]
    generated = []
    for number, modality in enumerate(to):
        grid = GRIDS[modality]
        shape = grid or (chosen.max_new_tokens,)
        placeholder = torch.zeros(shape, dtype=torch.int64).flatten()
        target = Part(modality, Tokens(placeholder, shape), Role.TARGET)
        objective, ids = objectives[modality], vocabulary.target_range(modality)
        draw = KeyedDraw(seed, 0, number, chosen)
        state = objective.begin(len(placeholder), chosen.steps, vocabulary.mask)
        while not state.done:
            logits = [reference_logits(model, parts, target, state.token_ids) for parts in documents]
            guided = logits[0] if len(logits) == 1 else objective.guide(logits[0], logits[1], chosen.guidance_scale)
            end_id = vocabulary.end_of(modality)
            state = objective.step(state, guided, ids.start, end_id, vocabulary.mask, draw)
        contents = [i for i in state.token_ids.tolist() if i != end_id]
        codes = vocabulary.to_codes(modality, torch.tensor(contents, dtype=torch.int64))
        generated.append(codes.tolist())
        # What was generated is a condition of what follows: only the conditional document goes on with it.
        documents[0].append(Part(modality, Tokens(codes, grid or (len(codes),)), earlier_role))
    return generated


def session(
    context: Sequence[Part],
    dropped: Sequence[Part] | None,
    to: Sequence[str],
    chosen: SamplingSettings,
    seed: int = 0,
) -> Session:
    return Session(context, dropped, Plan(tuple(to), dict.fromkeys(to, chosen), seed, max_rows=1000))


def run(engine: Engine, sessions: Sequence[Session]) -> list[list[list[int]]]:
    for _ in engine.run(sessions):
        pass
    return [[tokens.codes.tolist() for tokens in session.generated] for session in sessions]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.tuples(CONTEXTS, TARGETS, SETTINGS, st.integers(0, 2**63 - 1)), min_size=1, max_size=3),
    earlier_role=st.sampled_from([Role.CONTEXT, Role.TARGET]),
)
def test_cached_batched_ids_equal_the_uncached_ones(
    model: UnifiedModel,
    prompts: list[tuple[list[Part], list[str], SamplingSettings, int]],
    earlier_role: Role,
) -> None:
    sessions, expected = [], []
    for context, to, chosen, seed in prompts:
        dropped: list[Part] | None = [] if chosen.guidance_scale != 1 else None
        sessions.append(session(context, dropped, to, chosen, seed))
        branches = [context] if dropped is None else [context, dropped]
        expected.append(reference_generate(model, branches, to, chosen, seed, earlier_role))
    assert run(Engine(model, GRIDS), sessions) == expected


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.one_of(CONTEXT_TEXT, CONTEXT_IMAGE), min_size=1, max_size=4), data=st.data())
def test_incremental_forward_equals_the_full_one(model: UnifiedModel, parts: list[Part], data: st.DataObject) -> None:
    sequence = MultimodalSequence.build(parts, model.vocabulary, model.config.objectives)
    batch = pack([[sequence]], len(sequence), model.vocabulary)
    cache, found, row = KVCache(), [], 0
    # Between two rows of a bidirectional block nothing may be cut: the first would miss the second.
    inside = sequence.bidirectional[1:] & (sequence.block_ids[1:] == sequence.block_ids[:-1])
    cuts = [row + 1 for row in range(len(sequence) - 1) if not inside[row]]
    chosen = data.draw(st.sets(st.sampled_from(cuts))) if cuts else set()
    with torch.no_grad():
        full = model.hidden(
            batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids, batch.pattern
        )
        for stop in sorted({*chosen, len(sequence)}):
            rows = slice(row, stop)
            new = AttentionPattern(*(getattr(batch.pattern, n)[:, rows] for n in batch.pattern.__dataclass_fields__))
            noise = torch.randint(0, TEXT_SIZE, (1, stop - row))
            about = (batch.modality_ids[:, rows], batch.span_positions[:, rows], batch.position_ids[:, rows])
            model.hidden(noise, *about, cache.covering(new), cache)  # leaves no trace: not committed
            found.append(model.hidden(batch.token_ids[:, rows], *about, cache.covering(new), cache))
            cache.commit(new)
            row = stop
    torch.testing.assert_close(torch.cat(found, dim=1), full, atol=1e-5, rtol=1e-5)


def test_a_span_is_committed_whole_and_only_when_something_follows(model: UnifiedModel) -> None:
    context, chosen = [text_part([1, 2], Role.CONTEXT)], SamplingSettings()
    prompt_rows, marker, image_rows = 4, 1, 4
    alone = session(context, None, ["image"], chosen)
    run(Engine(model, GRIDS), [alone])
    assert alone.branches[0].n_committed == prompt_rows + marker
    followed = session(context, None, ["image", "image"], chosen)
    run(Engine(model, GRIDS), [followed])
    assert followed.branches[0].n_committed == prompt_rows + marker + image_rows + marker


def test_each_forward_pass_holds_whole_bidirectional_blocks(model: UnifiedModel) -> None:
    passes: list[torch.Tensor] = []
    model.decoder.register_forward_hook(lambda _module, args, _output: passes.append(args[1]))
    context = [image_part([1, 2, 3, 4], Role.CONTEXT), text_part([1], Role.CONTEXT)]
    run(Engine(model, GRIDS), [session(context, None, ["image"], SamplingSettings(steps=2))])
    prefill, *steps = [positions.shape[1] for positions in passes]
    assert prefill == (1 + 4) + (1 + 2) + 1
    assert steps == [4, 4]


@pytest.mark.parametrize("seed", range(20))
def test_only_ids_of_the_span_are_generated(model: UnifiedModel, seed: int) -> None:
    chosen = SamplingSettings(max_new_tokens=9, temperature=3.0)
    [[text, image]] = run(Engine(model, GRIDS), [session([], None, ["text", "image"], chosen, seed)])
    assert len(text) <= 9
    assert all(0 <= code < TEXT_SIZE for code in text)
    assert len(image) == 4
    assert all(0 <= code < CODEBOOK for code in image)
