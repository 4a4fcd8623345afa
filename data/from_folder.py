"""A folder of captioned images -> shards to train on, with an account of every file that was left out.

    omniform data from-folder photos --out runs/photos-data --validation 0.05

The same folder gives the same bytes. Images are stored as they are (their metadata too) unless they are resized, and
every one is decoded once, so that training meets none that it cannot read.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import posixpath
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from omniform.data.captions import Captions, Source
from omniform.data.folder_tree import FileError, FolderTree
from omniform.data.schema import DataError, RawSample, RawSpan
from omniform.data.shards import ShardWriter
from omniform.data.tally import Tally
from omniform.data.verify import write_manifest
from omniform.kernels.keyed_noise import keyed_uniform, stream
from omniform.modeling.config import STRICT
from omniform.modeling.folder import commit
from omniform.tokenizers.image_files import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageFileError,
    ImageHeader,
    read_header,
    read_picture,
)

VERSION = 1
REPORT = "report.json"
# By what the file holds: names are often wrong.
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
SUFFIXES = {
    **{".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG"},
    **{".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"},
}
JPEG_QUALITY = 95
_CONTROLS = ("Cc", "Zl", "Zp")  # Unicode categories of what commands a terminal, or ends a line
_LINE_EVERY = 10_000
_SHOWN_ENDINGS = 20


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderOptions:
    """What to take of a folder, and how.

    Attributes:
        caption_from: where captions are, as `Captions` has it; null finds out.
        caption_key: key of the caption in JSON or of its column; null: "caption", or else "text".
        captionless: whether images without a caption are left out, or kept as images alone.
        validation: share of the images for validation, in [0, 1]; a keyed hash of an image's path decides, so that none
            moves when others come or go.
        max_pixels: larger images are left out, before they are decoded.
        min_size: pixels of the shorter side; smaller images are left out.
        max_aspect_ratio: longer side over shorter side; null: any.
        resize: pixels of the shorter side to which larger images are brought (JPEG and WebP become JPEG of quality 95,
            others PNG, without metadata); null, and for smaller images: bytes are stored as they are.
        strict: the first file that cannot be read, or image without a caption that is not kept, ends it all.
    """

    caption_from: Source | None = None
    caption_key: str | None = None
    captionless: Literal["skip", "keep"] = "skip"
    validation: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    samples_per_shard: int = Field(default=2048, ge=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MAX_PIXELS)
    min_size: int = Field(default=1, ge=1)
    max_aspect_ratio: float | None = Field(default=None, ge=1)
    resize: int | None = Field(default=None, ge=1)
    strict: bool = False


@plain_dataclass
class FolderReport:
    """What became of the files of a folder.

    Attributes:
        read: image files found, by their names' endings.
        kept: images in each split.
        skipped: images that were left out, by reason.
        noted: images that were kept, by remark.
        other_files: how many files of which ending are no images, captions among them: the most frequent 20 endings,
            "other endings" in all, and "hidden".
        unused_rows: rows of the table that name no image.
    """

    read: int = 0
    kept: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    skipped: Tally = field(default_factory=Tally)
    noted: Tally = field(default_factory=Tally)
    unused_rows: Tally = field(default_factory=Tally)
    other_files: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {name: value.to_json() if isinstance(value, Tally) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        kept = " + ".join(f"{count} {split}" for split, count in self.kept.items())
        lines = [f"{self.read} images read, {sum(self.kept.values())} kept ({kept})"]
        for title, tally in (("skipped", self.skipped), ("noted", self.noted), ("not found", self.unused_rows)):
            lines += [f"{title}: {line}" for line in tally.lines()]
        if self.other_files:
            lines.append("other files: " + ", ".join(f"{count} x {end}" for end, count in self.other_files.items()))
        return "\n".join(lines)


def from_folder(folder: Path, out: Path, options: FolderOptions | None = None) -> FolderReport:
    """Write the images and captions below `folder` as shards: out/train, out/validation where some are held back,
    out/report.json and a manifest. `out` appears whole, at the end, or not at all.

    Raises:
        DataError: no such folder; `out` holds something, or lies in `folder`; a table of captions that cannot be read;
            no image was kept (the message is the report); or, if strict, the first file that is not as it should be.
    """
    options = options or FolderOptions()
    tree = FolderTree(folder)
    final = out.resolve()
    if final.is_relative_to(tree.root):
        raise DataError(f"{out} lies in {folder}, whose files it would join: choose a folder elsewhere")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise DataError(f"{out} exists and is not empty: remove it or choose another folder")
    captions = Captions(tree, options.caption_from, options.caption_key)
    report = FolderReport()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f".{final.name}.", final.parent) as private:
        draft = Path(private) / final.name  # its parent is for this process alone, whoever may read the result
        with contextlib.ExitStack() as stack:
            writers: dict[str, ShardWriter] = {}
            for path, sample in _samples(tree, captions, options, report):
                split = "validation" if _uniform(path, options.seed) < options.validation else "train"
                if split not in writers:
                    writer = ShardWriter(draft / split, options.samples_per_shard)
                    writers[split] = stack.enter_context(writer)
                writers[split].write(sample)
                report.kept[split] += 1
        for name in captions.rows:
            report.unused_rows.add("rows of the table without an image", _printable(name))
        if not any(report.kept.values()):
            raise DataError(f"{folder}: no image could be kept\n{report}")
        (draft / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        about = {"format": "omniform-folder", "version": VERSION, "options": asdict(options), "samples": report.kept}
        write_manifest(draft, about)
        if final.exists():
            final.rmdir()  # `commit` would replace what came into it meanwhile
        commit(draft, final)
    return report


def _samples(
    tree: FolderTree, captions: Captions, options: FolderOptions, report: FolderReport
) -> Iterator[tuple[str, RawSample]]:
    """Yield (path, sample) of the images that are kept, and write the account of all files."""
    others: collections.Counter[str] = collections.Counter()
    shown = sys.stderr.isatty()
    files = tqdm(tree.walk(), desc=f"reading {tree.root.name}", unit="file", disable=not shown)
    for path, problem in files:
        suffix = posixpath.splitext(path)[1].lower()
        if problem is None and suffix not in SUFFIXES:
            others[_printable(suffix) or "no ending"] += 1
            continue
        report.read += problem is None
        if not shown and report.read % _LINE_EVERY == 1 and problem is None:
            print(f"reading {tree.root}: image {report.read}", file=sys.stderr, flush=True)
        try:
            if problem is not None:
                raise problem
            caption = captions.find(path)
            payload = tree.read(path, MAX_BYTES)
            header = read_header(payload, options.max_pixels)
            if (unfit := _unfit(header, options)) is not None:
                report.skipped.add(unfit, _printable(path))
                continue
            if caption is None and options.captionless == "skip":
                raise FileError("no caption", path)
            content, extension = _stored(payload, header, options.resize)
        except (FileError, ImageFileError) as error:
            if options.strict:
                where = "" if isinstance(error, FileError) else f"{path}: "
                raise DataError(_printable(f"{where}{error}")) from error
            report.skipped.add(error.reason, _printable(path))
            continue
        for remark, holds in (
            ("the first of several pictures in one file", header.animated),
            ("a name that ends like another format", SUFFIXES[suffix] != header.file_format),
            ("resized", content is not payload),
            ("no caption", caption is None),
        ):
            if holds:
                report.noted.add(remark, _printable(path))
        spans = [] if caption is None else [RawSpan("text", text=caption)]
        spans.append(RawSpan("image", payload=content, extension=extension))
        yield path, RawSample(f"{sum(report.kept.values()):09d}", tuple(spans), {"file": _printable(path)})
    ordered = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    rest = {"other endings": sum(n for _, n in ordered[_SHOWN_ENDINGS:]), "hidden": tree.n_hidden}
    report.other_files = dict(ordered[:_SHOWN_ENDINGS]) | {what: n for what, n in rest.items() if n}


def _unfit(header: ImageHeader, options: FolderOptions) -> str | None:
    """Return which of the wishes an image does not meet, if any."""
    shorter, longer = sorted((header.width, header.height))
    if shorter < options.min_size:
        return "smaller than asked for"
    if options.max_aspect_ratio is not None and longer > options.max_aspect_ratio * shorter:
        return "longer and thinner than asked for"
    return None


def _stored(payload: bytes, header: ImageHeader, resize: int | None) -> tuple[bytes, str]:
    """Decode an image and return what to store, and its extension.

    Raises:
        ImageFileError: it cannot be decoded.
    """
    picture = read_picture(payload, "L" if header.grey else "RGB")
    shorter = min(picture.size)
    if resize is None or shorter <= resize:
        return payload, EXTENSIONS[header.file_format]
    width, height = (max(1, round(side * resize / shorter)) for side in picture.size)
    smaller = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    if header.file_format in ("JPEG", "WEBP"):
        smaller.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue(), "jpg"
    smaller.save(file, "PNG")
    return file.getvalue(), "png"


def _uniform(path: str, seed: int) -> float:
    """Return a number in (0, 1) that depends on an image's path and the seed alone."""
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return float(keyed_uniform(seed, stream("from-folder/validation"), int.from_bytes(digest[:8])))


def _printable(path: str) -> str:
    """Return a path as text that any file can hold, in one line: names need not be UTF-8, and may hold line breaks."""
    shown = path.encode(errors="backslashreplace").decode()
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in _CONTROLS else c for c in shown)
