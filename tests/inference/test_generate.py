"""The public API: what it promises about parts, seeds, batches, events and bad input."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.protocol import Done, Event, ImagePart, PartDone, Reply, SpanProgress, TextDelta, TextPart
from omniform.inference.sampling import KeyedDraw
from omniform.inference.session import Plan, Session
from omniform.modeling.config import ModelConfig
from omniform.modeling.folder import LoadedModel
from omniform.modeling.generation_config import SamplingSettings
from omniform.modeling.model import UnifiedModel
from omniform.modeling.objectives.masked import Masked

PICTURE = Image.new("L", (2, 2), 200)
PROMPTS: list[Any] = ["a seven", PICTURE, [], ["x", PICTURE, "yz"], [{"role": "user", "content": "four"}]]


def contents(reply: Reply) -> list[object]:
    return [part.image.tobytes() if isinstance(part, ImagePart) else part for part in reply.parts]


def test_parts_come_in_the_order_asked_for(omni: Model) -> None:
    reply = omni.generate(["like", PICTURE], to=["image", "text", "image"], seed=3, max_new_tokens=5)
    assert [part.modality for part in reply.parts] == ["image", "text", "image"]
    assert reply.text == reply.parts[1].data
    assert [image.size for image in reply.images] == [(2, 2), (2, 2)]


def test_text_is_the_default_target(omni: Model) -> None:
    assert [part.modality for part in omni.generate(PICTURE, seed=0).parts] == ["text"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("to", ["text", "image"])
def test_every_prompt_form_gives_every_target(omni: Model, prompt: object, to: str) -> None:
    assert [part.modality for part in omni.generate(prompt, to=to, seed=1).parts] == [to]


def test_a_seed_fixes_the_reply_and_is_told(omni: Model) -> None:
    drawn = omni.generate("a seven", to=["text", "image"])
    again = omni.generate("a seven", to=["text", "image"], seed=drawn.seed)
    assert contents(again) == contents(drawn)
    assert len({omni.generate("a seven", seed=seed).text for seed in range(5)}) > 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5),
    seed=st.integers(0, 2**62),
    to=st.sampled_from(["text", "image", ["text", "image"], ["image", "text"]]),
    batch_invariant=st.booleans(),
)
def test_a_batch_replies_as_its_prompts_alone(
    omni: Model, prompts: list[Any], seed: int, to: Any, batch_invariant: bool
) -> None:
    seeds = [seed + place for place in range(len(prompts))]
    together = omni.generate_batch(prompts, to, seed=seeds, batch_invariant=batch_invariant)
    alone = [omni.generate(prompt, to, seed=own) for prompt, own in zip(prompts, seeds, strict=True)]
    assert [contents(reply) for reply in together] == [contents(reply) for reply in alone]


def test_one_seed_for_a_batch_gives_different_samples(omni: Model) -> None:
    replies = omni.generate_batch(["a seven"] * 4, seed=2)
    assert len({reply.text for reply in replies}) > 1
    assert replies[0].text == omni.generate("a seven", seed=2).text
    assert omni.generate_batch([], seed=2) == []


@pytest.mark.parametrize("seed", range(12))
def test_events_tell_the_reply_in_order(omni: Model, seed: int) -> None:
    """Random bytes are mostly not UTF-8, so this covers characters that are cut between tokens too."""
    events = list(omni.stream(PICTURE, to=["text", "image", "text"], seed=seed))
    assert isinstance(events[-1], Done)
    reply = events[-1].reply
    assert contents(reply) == contents(omni.generate(PICTURE, to=["text", "image", "text"], seed=seed))
    for span, part in enumerate(reply.parts):
        own = [event for event in events[:-1] if event.span == span]
        assert own[-1] == PartDone(part, span)
        if isinstance(part, TextPart):
            assert "".join(event.text for event in own[:-1] if isinstance(event, TextDelta)) == part.text
        else:
            assert own[:-1] == [SpanProgress("image", step, 3, span) for step in (1, 2, 3)]
    spans = [event.span for event in events[:-1]]
    assert spans == sorted(spans)


def test_a_callback_sees_the_events_of_every_prompt(omni: Model) -> None:
    seen: list[Event] = []
    replies = omni.generate_batch(["a", "b"], to="image", seed=1, callback=seen.append)
    assert [event.reply for event in seen if isinstance(event, Done)] == replies
    assert {event.prompt for event in seen} == {0, 1}


def test_leaving_a_stream_frees_its_session(omni: Model) -> None:
    for event in omni.stream("a seven", to=["image", "text"], seed=0):
        assert isinstance(event, SpanProgress)
        assert omni.engine.n_active == 1
        break
    assert omni.engine.n_active == 0


def test_finish_reason_tells_a_cut_text_from_an_ended_one(omni: Model) -> None:
    parts = [omni.generate("a", seed=seed, max_new_tokens=1).parts[0] for seed in range(10)]
    assert all(part == TextPart(part.data, "length" if part.data else "end") for part in parts)


def test_temperature_zero_does_not_depend_on_the_seed(omni: Model) -> None:
    replies = [omni.generate("a", to=["text", "image"], temperature=0, seed=seed) for seed in (1, 2)]
    assert contents(replies[0]) == contents(replies[1])


def test_top_k_one_is_greedy_text(omni: Model) -> None:
    assert omni.generate("a", top_k=1, seed=5).text == omni.generate("a", temperature=0).text


def test_guidance_and_negative_prompt_change_the_result(omni: Model) -> None:
    def draw(**keywords: Any) -> object:
        return [contents(omni.generate("a seven", to="image", seed=s, temperature=0, **keywords)) for s in range(3)]

    plain, guided = draw(guidance_scale=1.0), draw(guidance_scale=6.0)
    assert plain != guided
    assert draw(guidance_scale=6.0, negative_prompt="zzz") != guided
    assert draw() == draw(guidance_scale=2.0)


def test_a_default_text_length_yields_to_the_room_left(omni: Model) -> None:
    long_prompt = "x" * 50  # 52 rows of 60, which leaves 6 tokens between begin and end
    for seed in range(8):
        assert len(omni.generate(long_prompt, seed=seed).text) <= 6


@pytest.mark.parametrize(
    ("prompt", "keywords", "message"),
    [
        ("x" * 80, {}, "prompt too long: the prompt takes 82 of this model's 60 tokens"),
        ("x" * 80, {"to": "image"}, "prompt too long"),
        ("x" * 50, {"max_new_tokens": 30}, "prompt too long.*or lower max_new_tokens"),
        ("a", {"to": "speech"}, "modality 'speech' asked for, but this model has text, image"),
        ("a", {"to": []}, "expected the name of a modality"),
        ("", {}, "empty text"),
        (3.5, {}, "expected a string, a PIL image"),
        ("a", {"to": "image", "steps": 0}, "steps is 0, expected greater than or equal to 1"),
        ("a", {"steps": 4}, "steps does not apply to text"),
        ("a", {"to": "image", "max_new_tokens": 4}, "max_new_tokens does not apply to image"),
        ("a", {"temperature": -0.1}, "temperature is -0.1, expected greater than or equal to 0"),
        ("a", {"top_k": 0}, "top_k is 0"),
        ("a", {"top_p": 0}, "top_p is 0"),
        ("a", {"temprature": 1}, "unknown setting 'temprature', expected one of .*temperature"),
        ([], {"to": "image", "guidance_scale": 3}, "guidance_scale is 3, but the prompt holds no condition"),
        ("a", {"negative_prompt": "b"}, "negative_prompt has no effect at guidance_scale 1"),
        ("a", {"seed": -1}, "seed is -1, expected an integer"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    omni: Model, prompt: object, keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(OmniformError, match=message):
        omni.generate(prompt, **keywords)
    with pytest.raises(OmniformError, match=message):
        omni.stream(prompt, **keywords)


def test_a_batch_is_a_list_with_one_seed_each(omni: Model) -> None:
    with pytest.raises(OmniformError, match="prompts is a str, expected a list"):
        omni.generate_batch("a seven")
    with pytest.raises(OmniformError, match="3 seeds for 2 prompts"):
        omni.generate_batch(["a", "b"], seed=[1, 2, 3])


@pytest.mark.parametrize(
    "config",
    [
        {"modalities": {"text": {"temperature": -1}}},
        {"modalities": {"speech": {}}},
        {"max_length": 3},
        {"max_sequence_length": 0},
    ],
)
def test_a_bad_generation_config_is_refused_at_loading(omni: Model, config: dict[str, Any]) -> None:
    with pytest.raises(OmniformError, match=r"generation_config\.json"):
        Model(LoadedModel(omni.network, omni.tokenizers, config))


def test_text_logits_are_causal_and_of_the_text_ids(omni: Model) -> None:
    token_ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    logits = omni.text_logits(token_ids)
    assert logits.shape == (2, 4, 256)
    torch.testing.assert_close(omni.text_logits(token_ids[:, :2]), logits[:, :2])


def test_text_logits_are_those_that_generation_reads(omni: Model) -> None:
    """Ids 0 to j of a greedy text give id j + 1."""
    greedy = SamplingSettings(temperature=0, max_new_tokens=10)
    session = Session([], None, Plan(("text",), {"text": greedy}, seed=0, max_rows=60))
    for _ in omni.engine.run([session]):
        pass
    codes = session.generated[0].codes
    assert len(codes) > 1
    assert torch.equal(omni.text_logits(codes[None])[0, :-1].argmax(-1), codes[1:])


@pytest.mark.parametrize(
    "token_ids",
    [torch.tensor([1, 2]), torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 2), torch.tensor([[256]]), ["a seven"]],
)
def test_text_logits_refuse_other_ids(omni: Model, token_ids: Any) -> None:
    with pytest.raises(OmniformError, match="expected"):
        omni.text_logits(token_ids)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_masked_text_ends_at_its_first_end_and_random_order_is_of_its_own_at_any_temperature(
    omni: Model, temperature: float
) -> None:
    objectives = {"text": Masked(steps=4, order="random"), "image": Masked(steps=3, order="random")}
    config = ModelConfig(decoder=omni.network.config.decoder, objectives=objectives)
    network = UnifiedModel(config, omni.network.vocabulary)
    with torch.no_grad():
        network.interface.head.weight[omni.network.vocabulary.end] *= 3
    model = Model(LoadedModel(network, omni.tokenizers, {"max_sequence_length": 60}))
    replies = model.generate_batch(
        ["a"] * 60, ["text", "image"], seed=list(range(60)), temperature=temperature, max_new_tokens=8
    )
    for reply in replies:
        assert len(reply.text.encode(errors="replace")) <= 3 * 8
    if temperature:
        assert {part.finish_reason for reply in replies for part in reply.parts[:1]} == {"end", "length"}
    draws = [KeyedDraw(seed, 0, 0, SamplingSettings(temperature=temperature)) for seed in range(50)]
    chosen = torch.stack([draw.subset(torch.ones(8, dtype=torch.bool), 4, 0) for draw in draws])
    assert (chosen.sum(1) == 4).all()
    assert len({tuple(row.tolist()) for row in chosen}) == 1 if not temperature else chosen.any(0).all()
