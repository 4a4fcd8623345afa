"""What goes in and what comes out: prompts, requests, events, replies."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from PIL import Image

from omniform.errors import OmniformError
from omniform.inference.editing import Edit
from omniform.inference.filling import Filling
from omniform.modeling.generation_config import SamplingSettings
from omniform.tokenizers.audio_files import Audio
from omniform.tokenizers.video_files import Video

ANY = "any"
FinishReason = Literal["end", "length"]
_ROLES = ("system", "user", "assistant")
_TYPES = ("text", "image", "speech", "video")


@dataclass(frozen=True)
class TextPart:
    """Text.

    Attributes:
        finish_reason: "end" if the text ended itself, "length" if it was cut at its largest number of tokens.
    """

    text: str
    finish_reason: FinishReason = "end"
    modality: ClassVar[str] = "text"

    @property
    def data(self) -> str:
        """The text: what every part calls its contents."""
        return self.text


@dataclass(frozen=True)
class ImagePart:
    """A picture."""

    image: Image.Image
    modality: ClassVar[str] = "image"

    @property
    def data(self) -> Image.Image:
        """The picture: what every part calls its contents."""
        return self.image


@dataclass(frozen=True)
class SpeechPart:
    """Speech; of a reply, at the tokenizer's rate, and without a sample where the model ended it at once."""

    audio: Audio
    modality: ClassVar[str] = "speech"

    @property
    def data(self) -> Audio:
        """The sound: what every part calls its contents."""
        return self.audio


@dataclass(frozen=True)
class VideoPart:
    """Moving pictures."""

    video: Video
    modality: ClassVar[str] = "video"

    @property
    def data(self) -> Video:
        """The video: what every part calls its contents."""
        return self.video


@dataclass(frozen=True)
class DataPart:
    """Data of any other modality, or an item of one of these, in the raw form of its tokenizer.

    Attributes:
        json: the data as JSON text, of a tokenizer that gives it (by a method `to_json`).
    """

    modality: str
    data: Any
    json: str | None = None


ContentPart = TextPart | ImagePart | SpeechPart | VideoPart | DataPart


@dataclass(frozen=True)
class Reply:
    """What one prompt was answered with.

    Attributes:
        parts: in the order in which they were asked for.
        through: what was generated before them on the way from the prompt; see `GenerationConfig`.
        seed: with the same prompt, settings and model it gives the same reply again.
        n_near_ties: choices on the way that the rounding of logits could have turned (see `KeyedDraw`): with none,
            the prompt has this reply in any batch. Those of routers (`model.decoder.experts: topk`) are not counted,
            and of parts made as vectors it says nothing.
    """

    parts: tuple[ContentPart, ...]
    seed: int
    n_near_ties: int = 0
    through: tuple[ContentPart, ...] = ()

    @property
    def text(self) -> str:
        """All text, one part per line."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> list[Image.Image]:
        """All pictures, in order."""
        return [part.image for part in self.parts if isinstance(part, ImagePart)]

    @property
    def speech(self) -> list[Audio]:
        """All sounds of speech, in order."""
        return [part.audio for part in self.parts if isinstance(part, SpeechPart)]

    @property
    def videos(self) -> list[Video]:
        """All videos, in order."""
        return [part.video for part in self.parts if isinstance(part, VideoPart)]


@dataclass(frozen=True)
class TextDelta:
    """More text of a span. The deltas of a span, joined, are the text of its part.

    Attributes:
        span: place of the part in the reply.
        prompt: place of the prompt in a batch.
    """

    text: str
    span: int
    prompt: int = 0


@dataclass(frozen=True)
class SpanProgress:
    """Steps done of a span that is filled in place."""

    modality: str
    step: int
    n_steps: int
    span: int
    prompt: int = 0


@dataclass(frozen=True)
class PartDone:
    """A part of the reply is complete."""

    part: ContentPart
    span: int
    prompt: int = 0


@dataclass(frozen=True)
class Done:
    """A reply is complete: the last event of its prompt."""

    reply: Reply
    prompt: int = 0


Event = TextDelta | SpanProgress | PartDone | Done


@dataclass(frozen=True)
class Request:
    """One prompt with everything that decides its reply.

    Attributes:
        prompt: parts in order; none for an unconditional sample.
        to: the parts to generate.
        settings: by modality that may be generated.
        dropped: what stands in the prompt's place where guidance drops the condition; None without guidance.
        seed: see `KeyedDraw`.
        sample: place among the samples that share the seed.
        edit: the picture that is to be drawn anew in part; None for a new one.
        through: if the first part only lies on the way, which the reply leaves out, how that is sampled, by modality.
        filling: the gap that the reply fills; None where it follows the prompt.
    """

    prompt: tuple[ContentPart, ...]
    to: "Targets"
    settings: Mapping[str, SamplingSettings]
    dropped: tuple[ContentPart, ...] | None
    seed: int
    sample: int = 0
    edit: Edit | None = None
    through: Mapping[str, SamplingSettings] = field(default_factory=dict)
    filling: Filling | None = None


@dataclass(frozen=True)
class Targets:
    """Which parts a reply has.

    Attributes:
        names: modality of each part, in order; None where the model chooses.
        max_parts: most parts, where the model chooses.
    """

    names: tuple[str, ...] | None
    max_parts: int

    def way(self, prompt: Sequence[ContentPart], ways: Mapping[str, Mapping[str, str]]) -> str | None:
        """Return what lies between a prompt of one modality and the first part; see `GenerationConfig.through`."""
        given = {part.modality for part in prompt}
        return None if len(given) != 1 or self.names is None else ways.get(given.pop(), {}).get(self.names[0])


def parse_prompt(prompt: object) -> tuple[ContentPart, ...]:
    """Turn what a user gives as one prompt into its parts.

    Args:
        prompt: a string, a PIL image, an `Audio`, a `Video`, a part, a mapping such as {"type": "speech", "speech":
            audio} (so for text, image and video), a list of these (empty for none), or a chat: a list of
            {"role": "system" | "user" | "assistant", "content": any of the former}, whose contents are joined in order.

    Raises:
        OmniformError: anything else, an unknown role, text without a character, or a type that is not that of the data.
    """
    if isinstance(prompt, list | tuple):
        messages = [isinstance(item, Mapping) and "role" in item for item in prompt]
        if any(messages) and not all(messages):
            raise OmniformError("a prompt mixes chat messages with other parts: give one or the other")
        return tuple(
            part for item in prompt for part in (_parse_message(item) if messages[0] else (_parse_item(item),))
        )
    return (_parse_item(prompt),)


def _parse_message(message: Mapping[str, Any]) -> tuple[ContentPart, ...]:
    if message["role"] not in _ROLES:
        raise OmniformError(f"a chat message has role {message['role']!r}, expected one of {', '.join(_ROLES)}")
    if set(message) != {"role", "content"}:
        raise OmniformError(f"a chat message has the keys {sorted(map(str, message))}, expected content and role")
    return parse_prompt(message["content"])


def _parse_item(item: object) -> ContentPart:
    if isinstance(item, ContentPart):
        return item
    if isinstance(item, str):
        if not item:
            raise OmniformError("a prompt holds an empty text: give at least one character, or [] for no condition")
        return TextPart(item)
    if isinstance(item, Image.Image):
        return ImagePart(item)
    if isinstance(item, Audio):
        return SpeechPart(item)
    if isinstance(item, Video):
        return VideoPart(item)
    if isinstance(item, Mapping) and item.get("type") in _TYPES and set(item) == {"type", item["type"]}:
        part = _parse_item(item[item["type"]])
        if part.modality != item["type"]:
            raise OmniformError(f"a prompt holds {part.modality} as {item['type']!r}, expected the type of what it is")
        return part
    raise OmniformError(
        f"a prompt holds a {type(item).__name__}, expected a string, a PIL image, omniform.Audio, omniform.Video, a "
        'part, a list of these, or a chat as a list of {"role", "content"}'
    )


def parse_targets(to: str | Sequence[str], max_parts: int | None = None) -> Targets:
    """Turn what a user gives as `to` into the parts of the reply.

    Args:
        max_parts: most parts where `to` is ANY; 8 unless given.

    Raises:
        OmniformError: neither a name nor a list of names, an empty list, or a `max_parts` that does not apply.
    """
    names = (to,) if not isinstance(to, list | tuple) else tuple(to)
    if not names or not all(isinstance(name, str) for name in names):
        raise OmniformError(f"to is {to!r}, expected the name of a modality or an ordered list of names")
    if ANY in names and len(names) > 1:
        raise OmniformError(f'to is {list(names)}, but "{ANY}" lets the model choose all parts: give it alone')
    if names == (ANY,):
        if max_parts is not None and (isinstance(max_parts, bool) or not isinstance(max_parts, int) or max_parts < 1):
            raise OmniformError(f"max_parts is {max_parts!r}, expected a number of parts, at least 1")
        return Targets(None, max_parts or 8)
    if max_parts is not None:
        raise OmniformError(f'max_parts is {max_parts}, which is for to="{ANY}": a list names its parts already')
    return Targets(names, len(names))


def check_each_once(prompt: Sequence[ContentPart], dropped: Sequence[ContentPart], to: Targets) -> None:
    """Refuse what a model that learnt subsets cannot read: a document of theirs holds each modality once.

    Args:
        dropped: what stands in the prompt's place where guidance drops the condition.

    Raises:
        OmniformError: a modality comes twice in the prompt and the reply.
    """
    for parts in (prompt, dropped):
        names = [*(part.modality for part in parts), *(to.names or ())]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise OmniformError(
                f"prompt and reply hold {', '.join(names)}, but this model learnt subsets of a document that has each "
                f"modality once (model.subsets): leave out all but one {' and one '.join(twice)}, or change to"
            )


def split_names(given: str) -> list[str]:
    """Return the names in a text that was typed, with commas or spaces between them."""
    return [name for name in re.split(r"[,\s]+", given) if name]


def parse_seeds(seed: int | Sequence[int] | None, n_prompts: int, fresh: int) -> list[tuple[int, int]]:
    """Return (seed, sample) of each prompt of a batch.

    Args:
        seed: one for all, whose prompts then are samples 0, 1, 2, ... of it; or one per prompt, each its sample 0; or
            None for `fresh`.

    Raises:
        OmniformError: not integers in [0, 2**63), or not one per prompt.
    """
    if isinstance(seed, list | tuple):
        if len(seed) != n_prompts:
            raise OmniformError(f"{len(seed)} seeds for {n_prompts} prompts, expected one seed, or one per prompt")
        pairs = [(given, 0) for given in seed]
    else:
        pairs = [(fresh if seed is None else seed, sample) for sample in range(n_prompts)]
    for given, _ in pairs:
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 2**63:
            raise OmniformError(f"seed is {given!r}, expected an integer in [0, 2**63)")
    return pairs
