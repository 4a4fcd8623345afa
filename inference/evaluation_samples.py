"""Prompts and replies as JSON that a page can show: text as it is, anything else as a data URL of a file."""

import base64
import io

import torch

from omniform.inference.generate import Model
from omniform.inference.part_items import part_of
from omniform.inference.protocol import ContentPart, DataPart, ImagePart, SpeechPart, TextPart, VideoPart
from omniform.tokenizers.audio_files import audio_bytes
from omniform.tokenizers.video_writing import video_bytes


def told(model: Model, part: ContentPart) -> dict[str, str]:
    """Return {"text": ...}, or a data URL of {"image": PNG}, {"speech": FLAC} or {"video": MP4}.

    A sound of no samples cannot be a file: it is shown as one of silence.
    """
    tokenizer = model.tokenizers[part.modality]
    shown = part_of(part.data, part.modality, tokenizer) if isinstance(part, DataPart) else part
    match shown:
        case TextPart(text=text):
            return {"text": text}
        case ImagePart(image=image):
            file = io.BytesIO()
            image.save(file, format="PNG")
            return {"image": _data_url("image/png", file.getvalue())}
        case SpeechPart(audio=audio):
            samples = audio.samples if len(audio.samples) else torch.zeros(1)
            return {"speech": _data_url("audio/flac", audio_bytes(samples, audio.rate, "flac"))}
        case VideoPart(video=video):
            return {"video": _data_url("video/mp4", video_bytes(video.frames, video.fps, "mp4"))}
    return {shown.modality: str(shown.data)}


def _data_url(media_type: str, file: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"
