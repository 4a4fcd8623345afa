"""Replies by way of another modality: the last parts of what is asked for openly, with the same seed."""

from typing import Any

import pytest
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.protocol import ContentPart, Done, ImagePart, PartDone, Reply, SpanProgress, TextDelta
from omniform.modeling.folder import LoadedModel

PICTURE = Image.new("L", (2, 2), 200)
WAYS = {"image": {"image": "text"}, "text": {"text": "image"}}


def with_ways(omni: Model, ways: dict[str, dict[str, str]], n_text: int = 12) -> Model:
    modalities: dict[str, Any] = {"text": {"max_new_tokens": n_text}, "image": {"guidance_scale": 2.0}}
    settings = {"max_sequence_length": 60, "modalities": modalities, "through": ways}
    return Model(LoadedModel(omni.network, omni.tokenizers, settings))


def contents(parts: tuple[ContentPart, ...]) -> list[object]:
    return [part.image.tobytes() if isinstance(part, ImagePart) else part for part in parts]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("prompt", "to", "openly"),
    [
        (PICTURE, ["image"], ["text", "image"]),
        ("a seven", ["text"], ["image", "text"]),
        (PICTURE, ["image", "text"], ["text", "image", "text"]),
        ([PICTURE, PICTURE], ["image"], ["text", "image"]),
        ("a seven", ["image"], ["image"]),
        ([PICTURE, "x"], ["image"], ["image"]),
        ([], ["text"], ["text"]),
    ],
)
def test_what_lies_on_the_way_is_generated_first_and_left_out(
    omni: Model, prompt: Any, to: list[str], openly: list[str], seed: int
) -> None:
    model = with_ways(omni, WAYS)
    reply, whole = model.generate(prompt, to, seed=seed), omni.generate(prompt, openly, seed=seed)
    n_through = len(openly) - len(to)
    assert contents(reply.through + reply.parts) == contents(whole.parts)
    assert len(reply.through) == n_through
    straight = model.generate(prompt, to, seed=seed, direct=True)
    assert contents(straight.parts) == contents(omni.generate(prompt, to, seed=seed).parts)
    assert straight.through == ()


def test_a_batch_may_hold_prompts_with_and_without_a_way(omni: Model) -> None:
    model = with_ways(omni, WAYS)
    prompts: list[Any] = [PICTURE, "a seven", ["x", PICTURE], PICTURE]
    replies = model.generate_batch(prompts, "image", seed=[5, 6, 7, 8])
    assert [len(reply.through) for reply in replies] == [1, 0, 0, 1]
    for prompt, reply in zip(prompts, replies, strict=True):
        alone = model.generate(prompt, "image", seed=reply.seed)
        assert contents(alone.through + alone.parts) == contents(reply.through + reply.parts)


@pytest.mark.parametrize("to", [["image", "text"], ["text", "image"]])
def test_events_tell_only_what_was_asked_for(omni: Model, to: list[str]) -> None:
    model = with_ways(omni, WAYS)
    events = list(model.stream(PICTURE if to[0] == "image" else "x", to, seed=2))
    assert isinstance(events[-1], Done)
    reply: Reply = events[-1].reply
    assert [part.modality for part in reply.through] == [to[1]]
    assert [event.part for event in events if isinstance(event, PartDone)] == list(reply.parts)
    for number, modality in enumerate(to):
        own = [event for event in events[:-1] if event.span == number]
        if modality == "image":
            assert [event.step for event in own[:-1] if isinstance(event, SpanProgress)] == [1, 2, 3]
        else:
            assert "".join(event.text for event in own if isinstance(event, TextDelta)) == reply.parts[number].data
    assert {event.span for event in events[:-1]} == {0, 1}


def test_settings_of_a_call_hold_for_the_parts_of_the_reply_alone(omni: Model) -> None:
    """Whatever the call says, a picture is written down as the model's own settings have it."""
    model = with_ways(omni, WAYS)
    usual = [model.generate(PICTURE, ["image", "text"], seed=seed) for seed in range(8)]
    assert len({reply.through for reply in usual}) > 1
    assert max(len(reply.through[0].data) for reply in usual) > 1
    keywords: dict[str, Any]
    for keywords in ({"temperature": 0}, {"top_k": 1}, {"max_new_tokens": 1}):
        changed = [model.generate(PICTURE, ["image", "text"], seed=seed, **keywords) for seed in range(8)]
        assert [reply.through for reply in changed] == [reply.through for reply in usual]
    assert all(len(reply.parts[1].data.encode()) <= 3 for reply in changed)


def test_a_picture_is_edited_straight(omni: Model) -> None:
    model, mask = with_ways(omni, WAYS), Image.new("L", (2, 2), 255)
    reply = model.generate(PICTURE, "image", image=PICTURE, mask=mask, seed=1)
    assert reply.through == ()
    assert contents(reply.parts) == contents(omni.generate(PICTURE, "image", image=PICTURE, mask=mask, seed=1).parts)


def test_ways_of_modalities_that_the_model_lacks_are_refused(omni: Model) -> None:
    for ways in ({"image": {"image": "speech"}}, {"video": {"image": "text"}}, {"text": {"video": "image"}}):
        with pytest.raises(OmniformError, match=r"speech|video"):
            with_ways(omni, ways)


def test_a_modality_on_the_way_is_another_than_both_ends(omni: Model) -> None:
    for ways in ({"image": {"text": "text"}}, {"image": {"text": "image"}}):
        with pytest.raises(OmniformError, match=r"image.text is (text|image), expected a modality other than these"):
            with_ways(omni, ways)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_direct_is_a_truth_value(omni: Model, value: Any) -> None:
    if value is None:
        assert omni.generate("x", direct=None, seed=0).text == omni.generate("x", seed=0).text
        return
    with pytest.raises(OmniformError, match=f"direct is {value!r}, expected True or False"):
        omni.generate("x", direct=value)


def test_room_counts_what_lies_on_the_way(omni: Model) -> None:
    model = with_ways(omni, WAYS)
    long = "x" * 50  # with its markers 52 of 60 rows; a picture takes 5, a text at least 3
    assert model.generate(long, "text", seed=0, direct=True).parts
    assert len(model.generate(long, "text", seed=0).through) == 1
    with pytest.raises(OmniformError, match=r"too long: .* 8 or more: shorten .* direct=True: 5 of these .* image on"):
        model.generate("x" * 51, "text", seed=0)


def test_text_on_the_way_leaves_room_for_the_reply_and_bounds_no_call(omni: Model) -> None:
    """The prompt takes 5 of 60 rows, a picture too: a text of 100 tokens would fill the rest, and has 48 or 23."""
    model = with_ways(omni, {"image": {"image": "text"}}, n_text=100)
    for to, most in ((["image"], 48), (["image", "text"], 23)):
        cut = [model.generate(PICTURE, to, seed=seed).through[0] for seed in range(30)]
        # Bytes that are no characters become one of three bytes each: cut texts are counted by their tokens.
        lengths = [
            len(model.tokenizers["text"].encode(part.data).codes) for part in cut if part.finish_reason == "length"
        ]
        assert lengths
        assert min(lengths) >= most
    assert len(model.generate(PICTURE, ["image", "text"], seed=0, max_new_tokens=20).parts) == 2
    with pytest.raises(OmniformError, match="lower max_new_tokens"):
        model.generate(PICTURE, ["image", "text"], seed=0, max_new_tokens=28)
