"""What was said in a chat, and how it is written down."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omniform.atomic import write_whole
from omniform.errors import OmniformError
from omniform.inference.protocol import ContentPart, SpeechPart, TextPart


@dataclass(frozen=True)
class FiledPart:
    """A part and the file that holds it, if one does."""

    part: ContentPart
    path: Path | None = None


@dataclass
class Turn:
    """A prompt and its reply.

    Attributes:
        seed: with the same prompt, context and settings it gives the same reply again.
        settings: those that were set, and not the model's own.
        stopped: the reply was stopped, and `reply` holds the parts that were complete.
        replaced: another reply to the prompt was asked for.
    """

    prompt: list[FiledPart]
    to: list[str]
    seed: int
    settings: dict[str, Any]
    reply: list[FiledPart]
    stopped: bool = False
    replaced: bool = False


def as_messages(turns: Sequence[Turn], prompt: Sequence[FiledPart]) -> list[dict[str, Any]]:
    """Return a prompt after earlier turns as a chat that `parse_prompt` takes.

    Replies that were stopped or replaced are left out with their prompts, and so is what says nothing: text
    without a character and speech without a sample.
    """
    messages = []
    for turn in turns:
        if not (turn.stopped or turn.replaced):
            answer = [filed for filed in turn.reply if not _holds_nothing(filed.part)]
            messages += [_message("user", turn.prompt), _message("assistant", answer)]
    return [*messages, _message("user", prompt)]


def write_transcript(turns: Sequence[Turn], path: Path) -> None:
    """Write turns as JSON Lines, a message a line: {"role", "parts"}, and with replies what they can be repeated with.

    A part is {"modality", "text"} or {"modality", "path"}, the path absolute. The file appears whole or not at all.

    Raises:
        OmniformError: a path that cannot be written.
    """
    messages = [message for turn in turns for message in _as_json(turn)]
    lines = "".join(f"{json.dumps(message, ensure_ascii=False)}\n" for message in messages)
    try:
        write_whole(path, lines.encode())
    except OSError as error:
        raise OmniformError(f"{path}: cannot be written: {error.strerror}") from error


def _holds_nothing(part: ContentPart) -> bool:
    if isinstance(part, SpeechPart):
        return not len(part.audio.samples)
    return isinstance(part, TextPart) and not part.text


def _message(role: str, parts: Sequence[FiledPart]) -> dict[str, Any]:
    return {"role": role, "content": [filed.part for filed in parts]}


def _as_json(turn: Turn) -> list[dict[str, Any]]:
    prompt: dict[str, Any] = {"role": "user", "parts": [_part_as_json(filed) for filed in turn.prompt]}
    reply: dict[str, Any] = {"role": "assistant", "parts": [_part_as_json(filed) for filed in turn.reply]}
    reply |= {name: getattr(turn, name) for name in ("to", "seed", "settings", "stopped", "replaced")}
    return [prompt, reply]


def _part_as_json(filed: FiledPart) -> dict[str, str | None]:
    if isinstance(filed.part, TextPart) and filed.path is None:
        return {"modality": "text", "text": filed.part.text}
    return {"modality": filed.part.modality, "path": None if filed.path is None else str(filed.path.absolute())}
