"""to="any": the model chooses what follows, and whatever it chooses is well-formed."""

import pytest
import torch
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.protocol import DataPart, Done, PartDone
from omniform.inference.session import Plan, Session
from omniform.modeling.config import DecoderConfig, ModelConfig
from omniform.modeling.corruption import corrupt
from omniform.modeling.folder import LoadedModel, build_vocabulary
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.base import Objective
from omniform.modeling.objectives.masked import Masked
from omniform.modeling.objectives.next_token import NextToken
from omniform.modeling.packed_batch import pack
from omniform.modeling.sequence import MultimodalSequence, Part, Role

PICTURE = Image.new("L", (2, 2), 40)
PROMPTS = ["a", [PICTURE], ["a much longer prompt than that", PICTURE], ["b", PICTURE, "c", PICTURE]]


def test_thousands_of_draws_from_random_weights_are_all_well_formed(omni: Model) -> None:
    """Temperature 2 over untrained logits: anything that the rules allow comes up."""
    objectives, vocabulary = omni.network.config.objectives, omni.network.vocabulary
    chosen = SamplingSettings(temperature=2.0, max_new_tokens=3)
    contexts = [
        [Part(name, omni.tokenizers[name].encode(item), Role.CONTEXT) for name, item in items]
        for items in (
            [("text", "a")],
            [("image", torch.zeros(1, 2, 2))],
            [("text", "a much longer prompt than that"), ("image", torch.zeros(1, 2, 2))],
            [("text", "long enough to leave little room for more")],
        )
    ]
    plans = [Plan(None, dict.fromkeys(omni.modalities, chosen), seed, 60, max_parts=7) for seed in range(1100)]
    sessions = [Session(contexts[place % 4], None, plan) for place, plan in enumerate(plans)]
    for _ in omni.engine.run(sessions):
        pass
    shapes = set()
    for session in sessions:
        generated = session.branches[0].parts[-len(session.generated) :]
        assert 1 <= len(session.generated) <= 7
        assert session.branches[0].n_rows(vocabulary, objectives) <= 60
        shapes.add(tuple(part.modality for part in generated))
        for part in generated:
            omni.tokenizers[part.modality].decode(part.tokens)
            vocabulary.to_ids(part.modality, part.tokens.codes)
            assert part.tokens.grid == (omni.engine.fixed_grids[part.modality] or (len(part.tokens.codes),))
    assert sum(len(session.generated) for session in sessions) > 2000
    assert len(shapes) > 30


def test_a_reply_alone_is_that_of_a_batch_and_streams_the_same_parts(omni: Model) -> None:
    together = omni.generate_batch(PROMPTS, "any", seed=[1, 2, 3, 4], temperature=1.0)
    for prompt, seed, reply in zip(PROMPTS, [1, 2, 3, 4], together, strict=True):
        assert reply.n_near_ties == 0
        events = list(omni.stream(prompt, "any", seed=seed, temperature=1.0))
        streamed = [event.part for event in events if isinstance(event, PartDone)]
        assert isinstance(events[-1], Done)
        assert events[-1].reply.parts == tuple(streamed)
        for part, other in zip(streamed, reply.parts, strict=True):
            assert part.data == other.data


def lesson(omni: Model, parts: list[tuple[str, object]]) -> list[Part]:
    return [Part(name, omni.tokenizers[name].encode(item), Role.TARGET) for name, item in parts]


@pytest.mark.parametrize("objective", [Masked(steps=2), NextToken()], ids=lambda o: o.kind)
def test_the_order_that_was_learnt_is_the_order_that_comes(omni: Model, objective: Objective) -> None:
    dark, light = torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 1.0)
    documents = [
        [("text", "dark"), ("image", dark), ("text", "then light"), ("image", light)],
        [("text", "light"), ("image", light), ("text", "done")],
        [("image", dark), ("image", light), ("text", "both")],
    ]
    decoder = DecoderConfig(dim=48, n_layers=2, n_heads=2, n_kv_heads=2, ffn_dim=96, rope_theta=100.0)
    objectives: dict[str, Objective] = {"text": NextToken(), "image": objective}
    config = ModelConfig(decoder=decoder, objectives=objectives, next_span_weight=1.0)
    torch.manual_seed(0)
    network = UnifiedModel(config, build_vocabulary(omni.tokenizers))
    lessons = [lesson(omni, parts) for parts in documents]
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(200):
        sequences = [
            MultimodalSequence.build(parts, network.vocabulary, objectives, 100 * step + number, learn_order=True)
            for number, parts in enumerate(lessons)
        ]
        batch = corrupt(pack([sequences], sum(map(len, sequences)), network.vocabulary), network.vocabulary, objectives)
        losses = network(batch)
        optimizer.zero_grad()
        torch.stack([losses[name] / batch.counts[name] for name in losses]).sum().backward()
        optimizer.step()
    learnt = Model(LoadedModel(network.eval(), omni.tokenizers, {}))
    for parts in documents:
        name, item = parts[0]
        reply = learnt.generate([DataPart(name, item)], to="any", temperature=0, seed=0)
        assert [part.modality for part in reply.parts] == [name for name, _ in parts[1:]]
        for part, (name, item) in zip(reply.parts, parts[1:], strict=True):
            expected = item if name == "text" else omni.tokenizers["image"].to_pil(item).tobytes()
            assert (part.data if name == "text" else part.data.tobytes()) == expected


def test_a_model_that_learnt_no_order_and_an_empty_prompt_are_refused(omni: Model) -> None:
    with pytest.raises(OmniformError, match="the prompt is empty"):
        omni.generate([], to="any")
    config = ModelConfig(decoder=omni.network.config.decoder, objectives=omni.network.config.objectives)
    unlearnt = Model(LoadedModel(UnifiedModel(config, omni.network.vocabulary), omni.tokenizers, {}))
    with pytest.raises(OmniformError, match="next_span_weight is 0"):
        unlearnt.generate("a", to="any")
    with pytest.raises(OmniformError, match="max_parts is 3, which is for"):
        omni.generate("a", to="text", max_parts=3)
