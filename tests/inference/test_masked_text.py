"""Text that is produced in masked blocks: its cache is exact, and what was learnt comes back whatever its length."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from span_oracle import OracleDraw

from omniform.inference.generate import Model
from omniform.inference.protocol import Done, TextDelta
from omniform.modeling.attention_pattern import AttentionPattern
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role
from omniform.tokenizers.base import Tokens


def codes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def part(text: str, role: Role) -> Part:
    return Part("text", Tokens(codes(text), (len(codes(text)),)), role)


def masked_text(omni: Model, ends: float = 2.0, **changes: Any) -> Model:
    """The same weights, text in blocks; ends are drawn now and then, or never with `ends` 0."""
    objectives: dict[str, Objective] = {"text": Masked(**{"block_size": 4, "steps": 3, **changes}), "image": Masked()}
    config = ModelConfig(decoder=omni.network.config.decoder, objectives=objectives)
    network = UnifiedModel(config, omni.network.vocabulary)
    network.load_state_dict(omni.network.state_dict())
    with torch.no_grad():
        network.interface.head.weight[network.vocabulary.end] *= ends
    return Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [8, 11])
def test_cached_blocks_are_those_that_whole_documents_give(omni: Model, seed: int, length: int) -> None:
    """Every step again as one pass over all rows so far, without a cache."""
    model = masked_text(omni, ends=0.0, choice_temperature=0.0)
    network, vocabulary, prompt = model.network, model.network.vocabulary, f"prompt {seed}"
    reply = model.generate(prompt, temperature=0, max_new_tokens=length)
    objective, draw = network.config.objectives["text"], OracleDraw(seed)
    state, first = objective.begin(length, None, vocabulary.mask), len(prompt) + 3
    while not state.done:
        parts = [part(prompt, Role.CONTEXT), part("x" * length, Role.CONTEXT)]
        layout = MultimodalSequence.build(parts, vocabulary, network.config.objectives)
        inputs = objective.inputs(state, 0)
        stop = first + state.n_final + len(inputs)
        layout.token_ids[first:stop] = torch.cat([state.token_ids[: state.n_final], inputs]).numpy()
        batch = pack([[layout]], len(layout), vocabulary)
        # Rows behind are later blocks, and the end, which a last block that is shorter has not got.
        arrays = (
            batch.pattern.document_ids,
            batch.pattern.block_ids,
            batch.pattern.bidirectional,
            batch.pattern.private,
        )
        pattern = AttentionPattern(*(array[:, :stop] for array in arrays))
        with torch.inference_mode():
            rows = (batch.token_ids, batch.modality_ids, batch.span_positions, batch.position_ids)
            hidden = network.hidden(*(array[:, :stop] for array in rows), pattern)[0, stop - len(inputs) :]
            logits = network.logits(hidden, vocabulary.target_range("text"))
        state = objective.step(state, logits, 0, vocabulary.end, vocabulary.mask, draw)
    assert len(state.token_ids) == length
    assert reply.text == bytes(state.token_ids.tolist()).decode(errors="replace")


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.sampled_from(["a", "a seven", [], ["x", "yz"]]), min_size=1, max_size=4),
    seed=st.integers(0, 2**62),
    to=st.sampled_from(["text", ["text", "image"], ["text", "text"]]),
    threshold=st.sampled_from([None, 0.2]),
    length=st.sampled_from([1, 4, 6, 12]),
)
def test_a_batch_replies_as_its_prompts_alone(
    omni: Model, prompts: list[Any], seed: int, to: Any, threshold: float | None, length: int
) -> None:
    """Sessions of one batch end after different blocks, and with a threshold finish a block in different steps."""
    model = masked_text(omni, threshold=threshold)
    seeds = [seed + place for place in range(len(prompts))]
    together = model.generate_batch(prompts, to, seed=seeds, max_new_tokens=length)
    alone = [model.generate(p, to, seed=s, max_new_tokens=length) for p, s in zip(prompts, seeds, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.text == other.text
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        assert all(len(p.data) <= length for p in one.parts if p.modality == "text")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_stream_tells_whole_blocks_and_they_are_the_text(omni: Model, seed: int, block_size: int | None) -> None:
    model = masked_text(omni, block_size=block_size)
    events = list(model.stream("a", seed=seed, max_new_tokens=20))
    assert isinstance(events[-1], Done)
    text = events[-1].reply.text
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == text
    assert text == model.generate("a", seed=seed, max_new_tokens=20).text


LESSONS = {"a": "ab", "b": "bcde", "c": "the cat sat", "d": ""}


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_texts_of_any_length_are_recited_block_after_block(omni: Model, threshold: float | None) -> None:
    """Shorter than a block, as long as one, of three, and empty: all end where they should."""
    text = Masked(
        block_size=4,
        steps=4,
        schedule="linear",
        masking="independent",
        weighting="elbo",
        choice_temperature=0,
        threshold=threshold,
    )
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    objectives: dict[str, Objective] = {"text": text, "image": Masked()}
    torch.manual_seed(0)
    network = UnifiedModel(ModelConfig(decoder=decoder, objectives=objectives), build_vocabulary(omni.tokenizers))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(200):
        sequences = [
            MultimodalSequence.build(
                [part(prompt, Role.CONTEXT), part(reply, Role.TARGET)],
                network.vocabulary,
                objectives,
                noise_key=1000 * step + number,
            )
            for number, (prompt, reply) in enumerate([*LESSONS.items()] * 3)
        ]
        length = max(map(len, sequences))
        batch = corrupt(pack([[s] for s in sequences], length, network.vocabulary), network.vocabulary, objectives)
        loss = network(batch)["text"] / batch.counts["text"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = Model(LoadedModel(network.eval(), omni.tokenizers, {}))
    replies = model.generate_batch([*LESSONS], temperature=0, seed=0, max_new_tokens=16)
    assert [reply.text for reply in replies] == [*LESSONS.values()]
    assert all(reply.parts[0].finish_reason == "end" for reply in replies if reply.parts[0].modality == "text")
