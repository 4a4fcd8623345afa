"""Parts of prompts and replies, as people hold them <-> items, as tokenizers take them."""

from typing import Any

from PIL import Image

from omniform.inference.protocol import ContentPart, DataPart, ImagePart, SpeechPart, TextPart, VideoPart
from omniform.tokenizers.audio_files import Audio
from omniform.tokenizers.base import Modality, TokenizerError
from omniform.tokenizers.speech import SpeechTokenizer
from omniform.tokenizers.video_files import Video

_FROM = {Image.Image: "from_pil", Audio: "from_audio", Video: "from_video"}
_TO = {"image": ("to_pil", ImagePart), "speech": ("to_audio", SpeechPart), "video": ("to_video", VideoPart)}


def item_of(part: ContentPart, tokenizer: Modality[Any], max_tokens: int | None = None) -> Any:
    """Return what the tokenizer of the part's modality encodes; data that is an item already stays as it is.

    Args:
        max_tokens: a sound that is sure to have more is refused before it is resampled; any is taken unless given.

    Raises:
        TokenizerError: a picture, sound or video that the tokenizer cannot take, or a sound that is too long.
    """
    if max_tokens is not None and isinstance(part, SpeechPart) and isinstance(tokenizer, SpeechTokenizer):
        _check_length(part.audio, tokenizer.seconds(max_tokens))
    for held, method in _FROM.items():
        if isinstance(part.data, held) and hasattr(tokenizer, method):
            return getattr(tokenizer, method)(part.data)
    return part.data


def _check_length(audio: Audio, max_seconds: float) -> None:
    if audio.rate > 0 and audio.seconds > max_seconds:  # the tokenizer refuses other rates
        raise TokenizerError(
            f"a sound of {audio.seconds:.2f} seconds, expected at most {max_seconds:.2f}, which take all of this "
            "model's tokens: cut it first"
        )


def part_of(item: Any, modality: str, tokenizer: Modality[Any]) -> ContentPart:
    """Return an item of a modality as the part that people hold: a `DataPart` where there is no such form."""
    if modality == "text":
        return TextPart(item)
    method, part_type = _TO.get(modality, ("", None))
    if part_type is None or not hasattr(tokenizer, method):
        return DataPart(modality, item, tokenizer.to_json(item) if hasattr(tokenizer, "to_json") else None)
    return part_type(getattr(tokenizer, method)(item))
