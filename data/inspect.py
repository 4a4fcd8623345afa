"""Look at data: counts and a contact sheet."""

import collections
import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from omniform.data.index import shard_folders
from omniform.data.schema import DataError, RawSample, SampleError
from omniform.data.sealed import unseal
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.data.verify import MANIFEST, decode_sound
from omniform.tokenizers.audio_files import read_audio_header
from omniform.tokenizers.base import TokenizerError
from omniform.tokenizers.image_files import read_header, read_picture
from omniform.tokenizers.video_files import read_video, read_video_header

_TILE, _STRIP, _GAP, _CAPTION_LINES, _LINE, _MARGIN = 128, 42, 2, 3, 14, 8
_MAX_FRAMES = 10_000


def info(
    folder: Path, index_dir: Path | None = None, *, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Return what the data is and holds, as JSON values: recipe and sources if known, and per split the number of
    shards, samples and bytes, the spans by modality, samples with an image and no text, characters of text, sizes of
    images, seconds and rates of speech, frames, seconds and sizes of videos, as far as their files state them, and
    counts per digit label; and by reason how many samples or files cannot be read, and the first ones' keys. Only the
    headers of files are read: `verify` decodes them.

    Args:
        progress: called with the name of each folder before it is read.

    Raises:
        DataError: no shards, or shards without an index.
    """
    manifest = unseal(folder / MANIFEST, "build the data again") if (folder / MANIFEST).exists() else {}
    about = {key: value for key, value in manifest.items() if key not in ("files", "samples")}
    splits = {}
    for name, reader in _splits(folder, index_dir):
        if progress is not None:
            progress(name)
        splits[name] = _summary(reader)
    return {**about, "folder": str(folder), "splits": splits}


def preview(folder: Path, out: Path, n: int = 16, index_dir: Path | None = None) -> Path:
    """Draw a contact sheet, `n` samples of each split evenly spread over it, each over its captions: images, waveforms
    of speech, and the first, middle and last frame of videos; a file that cannot be read is a red cross.

    Args:
        out: the PNG file to write.

    Raises:
        DataError: `out` is not named .png, `n` is below 1, no shards, or a sample whose bytes changed.
    """
    if out.suffix.lower() != ".png":
        raise DataError(f"the contact sheet cannot be written as {out.name!r}: give a name that ends in .png")
    if n < 1:
        raise DataError(f"{n} samples asked for, expected at least 1")
    sections = []
    for name, reader in _splits(folder, index_dir):
        places = np.unique(np.linspace(0, len(reader) - 1, n).round().astype(int))
        sections.append((f"{name}: {len(places)} of {len(reader)} samples", [reader[int(place)] for place in places]))
    columns = min(8, n)
    width = _TILE + _MARGIN
    heights = [2 * _LINE + -(-len(samples) // columns) * _cell_height(samples) for _, samples in sections]
    sheet = Image.new("RGB", (columns * width + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for (title, samples), height in zip(sections, heights, strict=True):
        draw.text((_MARGIN, top), title, fill="black")
        for place, sample in enumerate(samples):
            row, column = divmod(place, columns)
            corner = (_MARGIN + column * width, top + 2 * _LINE + row * _cell_height(samples))
            _draw_sample(sheet, draw, sample, corner, _cell_height(samples) - _MARGIN)
        top += height
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def _splits(folder: Path, index_dir: Path | None) -> Iterator[tuple[str, ShardReader]]:
    for shard_folder in shard_folders(folder):
        indexes = None if index_dir is None else index_dir / shard_folder.relative_to(folder)
        yield shard_folder.name, ShardReader(shard_folder, indexes)


def _summary(reader: ShardReader) -> dict[str, Any]:
    spans: collections.Counter[str] = collections.Counter()
    digits: collections.Counter[str] = collections.Counter()
    media = _Media()
    unreadable = Tally()
    n_characters = n_uncaptioned = 0
    for place in range(len(reader)):
        try:
            sample = reader[place]
            media.add(sample)
        except (SampleError, TokenizerError) as error:
            unreadable.add(error.reason, reader.describe(place))
            continue
        modalities = [span.modality for span in sample.spans]
        spans.update(modalities)
        n_uncaptioned += "image" in modalities and "text" not in modalities
        n_characters += sum(len(span.text or "") for span in sample.spans)
        if "digit" in sample.metadata:
            digits[str(sample.metadata["digit"])] += 1
    summary = {
        "shards": len(reader.shards),
        "samples": len(reader),
        "bytes": sum(shard.size for shard in reader.shards),
        "spans": dict(sorted(spans.items())),
        "uncaptioned": n_uncaptioned,
        "characters": n_characters,
    }
    if unreadable:
        summary["unreadable"] = unreadable.to_json()
    summary.update(media.to_json())
    if digits:
        summary["digits"] = dict(sorted(digits.items()))
    return summary


@dataclass
class _Media:
    """What the headers of images, sounds and videos state, added up."""

    image_sizes: collections.Counter[str] = field(default_factory=collections.Counter)
    speech_rates: collections.Counter[str] = field(default_factory=collections.Counter)
    speech_seconds: float = 0.0
    video_sizes: collections.Counter[str] = field(default_factory=collections.Counter)
    video_frames: int = 0
    video_seconds: float = 0.0

    def add(self, sample: RawSample) -> None:
        """Count a sample's files: all of them, or none if one cannot be read."""
        images = [read_header(payload) for payload in _payloads(sample, "image")]
        sounds = [read_audio_header(payload) for payload in _payloads(sample, "speech")]
        videos = [read_video_header(payload) for payload in _payloads(sample, "video")]
        self.image_sizes.update(f"{header.width}x{header.height}" for header in images)
        self.speech_rates.update(f"{header.rate} Hz" for header in sounds)
        self.speech_seconds += sum(header.seconds or 0 for header in sounds)
        self.video_sizes.update(f"{header.width}x{header.height}" for header in videos)
        self.video_frames += sum(header.n_frames or 0 for header in videos)
        self.video_seconds += sum(header.seconds or 0 for header in videos)

    def to_json(self) -> dict[str, Any]:
        """Return what there is, the most frequent sizes and rates of many."""
        found: dict[str, Any] = {}
        if self.image_sizes:
            found["image_sizes"] = dict(self.image_sizes.most_common(10))
        if self.speech_rates:
            found["speech_rates"] = dict(self.speech_rates.most_common(10))
            found["speech_seconds"] = round(self.speech_seconds, 3)
        if self.video_sizes:
            found["video_sizes"] = dict(self.video_sizes.most_common(10))
            found["video_frames"] = self.video_frames
            found["video_seconds"] = round(self.video_seconds, 3)
        return found


def _payloads(sample: RawSample, modality: str) -> list[bytes]:
    return [span.payload for span in sample.spans if span.modality == modality and span.payload is not None]


def _cell_height(samples: Sequence[RawSample]) -> int:
    n_strips = max((len(_payloads(s, "speech")) + len(_payloads(s, "video")) for s in samples), default=0)
    pictures = _TILE if any(_payloads(sample, "image") for sample in samples) else 0
    return pictures + n_strips * (_STRIP + _GAP) + _CAPTION_LINES * _LINE + _MARGIN


def _draw_sample(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, sample: RawSample, corner: tuple[int, int], height: int
) -> None:
    left, top = corner
    images = _payloads(sample, "image")
    y = top
    for place, payload in enumerate(images):
        side = _TILE // len(images)
        _draw_file(sheet, draw, _thumbnail, payload, (left + place * side, y, side, side))
    y += _TILE if images else 0
    for modality, strip in (("video", _film), ("speech", _waveform)):
        for payload in _payloads(sample, modality):
            _draw_file(sheet, draw, strip, payload, (left, y, _TILE, _STRIP))
            y += _STRIP + _GAP
    files = [span.modality for span in sample.spans if span.payload is not None]
    others = [f"[{modality}]" for modality in files if modality not in ("image", "speech", "video")]
    captions = [*others, *(span.text for span in sample.spans if span.text is not None)]
    for line in textwrap.wrap(" | ".join(captions), 20, max_lines=_CAPTION_LINES, placeholder=" ..."):
        draw.text((left, y), line, fill="black")
        y += _LINE
    draw.rectangle((left - 2, top - 2, left + _TILE + 1, top + height), outline="lightgrey")


def _draw_file(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Callable[[bytes, tuple[int, int]], Image.Image],
    payload: bytes,
    box: tuple[int, int, int, int],
) -> None:
    """Draw what `picture` makes of a file within `box` (left, top, width, height), or a red cross."""
    left, top, width, height = box
    try:
        sheet.paste(picture(payload, (width, height)), (left, top))
    except TokenizerError:
        right, bottom = left + width - 1, top + height - 1
        draw.line((left, top, right, bottom), fill="red")
        draw.line((left, bottom, right, top), fill="red")


def _thumbnail(payload: bytes, size: tuple[int, int]) -> Image.Image:
    return _within(read_picture(payload, "RGB"), size)


def _within(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture to the largest of its proportions that `size` holds."""
    scale = min(size[0] / picture.width, size[1] / picture.height)
    smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), smooth)


def _film(payload: bytes, size: tuple[int, int]) -> Image.Image:
    """Return the first, middle and last frame side by side."""
    width = (size[0] - 2 * _GAP) // 3
    frames = read_video(
        payload, fps=None, max_frames=_MAX_FRAMES, fit=lambda picture: _within(picture, (width, size[1]))
    ).frames
    strip = Image.new("RGB", size, "white")
    for place, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        strip.paste(Image.fromarray(frame), (place * (width + _GAP), 0))
    return strip


def _waveform(payload: bytes, size: tuple[int, int]) -> Image.Image:
    """Return the range of levels in each column of pixels, from full scale at the top to the bottom."""
    samples = decode_sound(payload).numpy()
    strip = Image.new("RGB", size, "whitesmoke")
    draw = ImageDraw.Draw(strip)
    edges = np.linspace(0, len(samples), size[0] + 1).astype(int)
    for column, (start, stop) in enumerate(itertools.pairwise(edges)):
        shown = samples[start : max(stop, start + 1)]
        top, bottom = ((1 - float(level)) / 2 * (size[1] - 1) for level in (shown.max(), shown.min()))
        draw.line((column, round(top), column, round(bottom)), fill="steelblue")
    return strip
