"""Look at data: counts and a contact sheet."""

import collections
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from omniform.data.index import shard_folders
from omniform.data.schema import DataError, RawSample, SampleError
from omniform.data.sealed import unseal
from omniform.data.shards import ShardReader
from omniform.data.tally import Tally
from omniform.data.verify import MANIFEST
from omniform.tokenizers.image_files import ImageFileError, read_header, read_picture

_TILE, _CAPTION_LINES, _LINE, _MARGIN = 128, 3, 14, 8


def info(folder: Path, index_dir: Path | None = None) -> dict[str, Any]:
    """Return what the data is and holds, as JSON values: recipe and sources if known, and per split the number of
    shards, samples and bytes, the spans by modality, samples with an image and no text, characters of text, sizes of
    images, and counts per digit label; and by reason how many samples or images cannot be read, and the first ones'
    keys. Only the headers of images are read: `verify` decodes them.

    Raises:
        DataError: no shards, or shards without an index.
    """
    manifest = unseal(folder / MANIFEST, "build the data again") if (folder / MANIFEST).exists() else {}
    about = {key: value for key, value in manifest.items() if key not in ("files", "samples")}
    splits = {name: _summary(reader) for name, reader in _splits(folder, index_dir)}
    return {**about, "folder": str(folder), "splits": splits}


def preview(folder: Path, out: Path, n: int = 16, index_dir: Path | None = None) -> Path:
    """Draw a contact sheet, `n` samples of each split evenly spread over it, each over its captions; an image that
    cannot be read is a red cross.

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
    sizes: collections.Counter[str] = collections.Counter()
    digits: collections.Counter[str] = collections.Counter()
    unreadable = Tally()
    n_characters = n_uncaptioned = 0
    for place in range(len(reader)):
        try:
            sample = reader[place]
            sizes.update(_sizes(sample))
        except (SampleError, ImageFileError) as error:
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
    if sizes:
        summary["image_sizes"] = dict(sizes.most_common(10))
    if digits:
        summary["digits"] = dict(sorted(digits.items()))
    return summary


def _sizes(sample: RawSample) -> list[str]:
    headers = [read_header(payload) for payload in _image_payloads(sample)]
    return [f"{header.width}x{header.height}" for header in headers]


def _image_payloads(sample: RawSample) -> list[bytes]:
    return [span.payload for span in sample.spans if span.modality == "image" and span.payload is not None]


def _cell_height(samples: Sequence[RawSample]) -> int:
    return (_TILE if any(map(_image_payloads, samples)) else 0) + _CAPTION_LINES * _LINE + _MARGIN


def _draw_sample(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, sample: RawSample, corner: tuple[int, int], height: int
) -> None:
    left, top = corner
    images = _image_payloads(sample)
    others = [f"[{span.modality}]" for span in sample.spans if span.payload is not None and span.modality != "image"]
    for place, payload in enumerate(images):
        side = _TILE // len(images)
        try:
            image = read_picture(payload, "RGB")
        except ImageFileError:
            box = (left + place * side, top, left + (place + 1) * side - 1, top + side - 1)
            draw.line((*box[:2], *box[2:]), fill="red")
            draw.line((box[0], box[3], box[2], box[1]), fill="red")
            continue
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        smooth = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        sheet.paste(image.resize(size, smooth), (left + place * side, top))
    captions = [*others, *(span.text for span in sample.spans if span.text is not None)]
    y = top + _TILE if images else top
    for line in textwrap.wrap(" | ".join(captions), 20, max_lines=_CAPTION_LINES, placeholder=" ..."):
        draw.text((left, y), line, fill="black")
        y += _LINE
    draw.rectangle((left - 2, top - 2, left + _TILE + 1, top + height), outline="lightgrey")
