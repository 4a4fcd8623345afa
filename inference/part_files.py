"""Parts of prompts and replies <-> files: the suffix of a name says which modality and which format."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from omniform.atomic import write_whole
from omniform.errors import OmniformError
from omniform.inference.generate import Model
from omniform.inference.part_items import part_of
from omniform.inference.protocol import ContentPart, DataPart, ImagePart, SpeechPart, TextPart, parse_prompt
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.base import Modality
from omniform.tokenizers.image_files import MAX_BYTES
from omniform.tokenizers.speech import SpeechTokenizer
from omniform.tokenizers.video_writing import video_bytes

DEFAULT_SUFFIX = {"text": ".txt", "image": ".png", "speech": ".wav", "video": ".mp4"}
JSON_SUFFIX = ".json"  # of every other modality

# In the order in which a modality that the model has is looked for: a GIF is a video, or else its first frame a
# picture; a film is a video, or else its sound is speech.
_READ = {
    "video": (".mp4", ".webm", ".gif", ".m4v", ".mov", ".mkv", ".avi"),
    "speech": (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".mka", ".mp4", ".webm", ".mov", ".mkv"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    "text": (".txt", ".md", ".csv"),
}
_WRITTEN = {
    "text": (".txt", ".md"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    "speech": (".wav", ".flac", ".mp3", ".ogg"),
    "video": (".mp4", ".webm", ".gif"),
}


def read_part(path: str | Path, model: Model) -> ContentPart:
    """Read a file as a part of a prompt: what the model's tokenizer makes of it, at its rate and size.

    A sound is decoded no further than the model's number of tokens reaches. The last line break of a text ends its last
    line, and is left out. A file of another modality than these four is JSON, which the `read` of its tokenizer knows.

    Raises:
        OmniformError: a file that is missing, unreadable, above MAX_BYTES, without contents, of a kind that the model
            does not take, or a sound longer than it takes; the message begins with the path.
    """
    path = Path(path)
    modality = _modality_to_read(path, model)
    tokenizer = model.tokenizers[modality]
    try:
        with path.open("rb") as file:
            payload = file.read(MAX_BYTES + 1)
        if len(payload) > MAX_BYTES:
            raise OmniformError(f"the file is too large, expected at most {MAX_BYTES:,} bytes")
        item = _read_item(payload, tokenizer, model.max_sequence_length)
        item = item.removesuffix("\n").removesuffix("\r") if modality == "text" else item
        [part] = parse_prompt(item if modality == "text" else part_of(item, modality, tokenizer))
    except OSError as error:
        raise OmniformError(f"{path}: cannot be read: {error.strerror}; expected a readable file") from error
    except OmniformError as error:
        raise OmniformError(f"{path}: {error}") from error
    return part


def write_part(part: ContentPart, path: str | Path) -> None:
    """Write a part in the format that the suffix of `path` names, beside it first and then renamed: whole or not at
    all.

    Raises:
        OmniformError: a suffix of another modality, a part that holds nothing or has no form in files, or a path that
            cannot be written.
    """
    path = Path(path)
    check_suffix(path, part.modality)
    payload = _payload(part, path.suffix.lower())
    try:
        write_whole(path, payload)
    except OSError as error:
        raise OmniformError(f"{path}: cannot be written: {error.strerror}") from error


def check_suffix(path: Path, modality: str) -> None:
    """Check that the suffix of a path names a format that parts of a modality are written in.

    Raises:
        OmniformError: it does not.
    """
    if path.suffix.lower() not in formats(modality):
        given = path.suffix or "no suffix"
        raise OmniformError(f"{path}: {given} is no format of {modality}, use {' '.join(formats(modality))}")


def formats(modality: str) -> tuple[str, ...]:
    """Return the suffixes that parts of a modality are written with."""
    return _WRITTEN.get(modality, (JSON_SUFFIX,))


def default_suffix(modality: str) -> str:
    """Return the suffix of files that nobody named."""
    return DEFAULT_SUFFIX.get(modality, JSON_SUFFIX)


def has_files(modality: str, model: Model) -> bool:
    """Return whether parts of a modality that the model generates can be written: one of the four, or as JSON."""
    return modality in _WRITTEN or hasattr(model.tokenizers[modality], "to_json")


def _modality_to_read(path: Path, model: Model) -> str:
    suffix = path.suffix.lower()
    if suffix == JSON_SUFFIX:
        found = [name for name in model.modalities if name not in _READ and has_files(name, model)]
        if len(found) > 1:
            raise OmniformError(f"{path}: this model has several modalities of JSON files: {', '.join(found)}")
    else:
        found = [name for name, suffixes in _READ.items() if suffix in suffixes and name in model.modalities]
    if not found:
        raise OmniformError(
            f"{path}: {path.suffix or 'a name without suffix'} is no kind of file that this model takes, which has "
            f"{', '.join(model.modalities)}"
        )
    return found[0]


def _read_item(payload: bytes, tokenizer: Modality[Any], max_tokens: int) -> Any:
    if isinstance(tokenizer, SpeechTokenizer):
        return tokenizer.read(payload, max_seconds=tokenizer.seconds(max_tokens))
    return tokenizer.read(payload)


def _payload(part: ContentPart, suffix: str) -> bytes:
    if isinstance(part, TextPart):
        return f"{part.text}\n".encode()
    if isinstance(part, DataPart):
        if part.json is None:
            raise OmniformError(f"a {part.modality} part in the raw form of its tokenizer has no form in files")
        return f"{part.json}\n".encode()
    if isinstance(part, ImagePart):
        file = io.BytesIO()
        try:
            part.image.save(file, Image.registered_extensions()[suffix])
        except OSError as error:  # such as a JPEG of a transparent picture
            raise OmniformError(f"a picture of mode {part.image.mode} is not written as {suffix}: {error}") from error
        return file.getvalue()
    if isinstance(part, SpeechPart):
        if not len(part.audio.samples):
            raise OmniformError("speech without a sample, which no file holds")
        return audio_bytes(part.audio.samples, part.audio.rate, suffix[1:])
    return video_bytes(part.video.frames, part.video.fps, suffix[1:])
