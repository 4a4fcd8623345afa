"""Prompts, targets and seeds: every form that is promised is read, everything else is refused with what to do."""

import numpy as np
import pytest
import torch
from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.protocol import (
    DataPart,
    ImagePart,
    Reply,
    SpeechPart,
    Targets,
    TextPart,
    VideoPart,
    parse_prompt,
    parse_seeds,
    parse_targets,
)
from omniform.tokenizers.audio_files import Audio
from omniform.tokenizers.video_files import Video

PICTURE = Image.new("L", (4, 4), 128)
SOUND = Audio(torch.linspace(-1, 1, 50), 8000)
FILM = Video(np.zeros((3, 4, 4, 1), np.uint8), 8.0)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a seven", (TextPart("a seven"),)),
        (PICTURE, (ImagePart(PICTURE),)),
        ([], ()),
        (["like", PICTURE, "but a two"], (TextPart("like"), ImagePart(PICTURE), TextPart("but a two"))),
        ((TextPart("a"), DataPart("tone", 3)), (TextPart("a"), DataPart("tone", 3))),
        ([{"role": "user", "content": "a seven"}], (TextPart("a seven"),)),
        (
            [
                {"role": "system", "content": "draw"},
                {"role": "user", "content": [PICTURE, {"type": "text", "text": "this"}]},
                {"role": "assistant", "content": {"type": "image", "image": PICTURE}},
            ],
            (TextPart("draw"), ImagePart(PICTURE), TextPart("this"), ImagePart(PICTURE)),
        ),
        ([SOUND, FILM], (SpeechPart(SOUND), VideoPart(FILM))),
        (
            [{"type": "speech", "speech": SOUND}, {"type": "video", "video": FILM}, {"type": "text", "text": "a"}],
            (SpeechPart(SOUND), VideoPart(FILM), TextPart("a")),
        ),
        ({"type": "speech", "speech": DataPart("speech", 3)}, (DataPart("speech", 3),)),
    ],
)
def test_prompt_forms(prompt: object, parts: tuple[object, ...]) -> None:
    assert parse_prompt(prompt) == parts


def test_a_reply_is_a_prompt() -> None:
    parts = (TextPart("seven"), ImagePart(PICTURE), SpeechPart(SOUND), TextPart("!", "length"), VideoPart(FILM))
    reply = Reply(parts, seed=4)
    assert parse_prompt(reply.parts) == reply.parts
    assert reply.text == "seven\n!"
    assert (reply.images, reply.speech, reply.videos) == ([PICTURE], [SOUND], [FILM])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty text"),
        (["a", ""], "empty text"),
        (7, "holds a int, expected a string, a PIL image"),
        (None, "holds a NoneType"),
        (["a", ["nested"]], "holds a list"),
        ([{"type": "audio", "audio": b""}], "holds a dict"),
        ([{"type": "speech", "speech": "seven"}], "holds text as 'speech', expected the type of what it is"),
        ([{"type": "image", "image": FILM}], "holds video as 'image'"),
        (SOUND.samples, "holds a Tensor, expected a string, a PIL image, omniform.Audio"),
        ([{"role": "robot", "content": "a"}], "role 'robot', expected one of system, user, assistant"),
        ([{"role": "user", "content": "a", "name": "b"}], r"keys \['content', 'name', 'role'\]"),
        ([{"role": "user"}], r"keys \['role'\], expected content and role"),
        (["a", {"role": "user", "content": "b"}], "mixes chat messages"),
    ],
)
def test_other_prompts_are_refused(prompt: object, message: str) -> None:
    with pytest.raises(OmniformError, match=message):
        parse_prompt(prompt)


def test_targets() -> None:
    assert parse_targets("image") == Targets(("image",), 1)
    assert parse_targets(["text", "image", "text"]) == Targets(("text", "image", "text"), 3)
    assert parse_targets("any") == Targets(None, 8)
    assert parse_targets("any", 3) == Targets(None, 3)
    for to, max_parts in (("any", 0), ("any", True), ("image", 2)):
        with pytest.raises(OmniformError, match="max_parts is"):
            parse_targets(to, max_parts)
    for wrong in ([], [3], 5):
        with pytest.raises(OmniformError, match="expected the name of a modality or an ordered list"):
            parse_targets(wrong)


def test_seeds() -> None:
    assert parse_seeds(5, 3, fresh=9) == [(5, 0), (5, 1), (5, 2)]
    assert parse_seeds([5, 7], 2, fresh=9) == [(5, 0), (7, 0)]
    assert parse_seeds(None, 2, fresh=9) == [(9, 0), (9, 1)]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, [0, 1], [0, "a", 2], "7"])
def test_other_seeds_are_refused(seed: object) -> None:
    with pytest.raises(OmniformError, match="seed"):
        parse_seeds(seed, 3, fresh=0)  # type: ignore[arg-type]
