"""Folders of images as people have them, and what became of them."""

import io
from pathlib import Path

from PIL import Image

from omniform.data.from_folder import FolderReport
from omniform.data.shards import ShardReader


def picture(
    file_format: str = "PNG", size: tuple[int, int] = (8, 6), colour: object = "red", **settings: object
) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file, file_format, **settings)
    return file.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files by their relative paths."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(out: Path, split: str = "train") -> dict[str, str | None]:
    """Caption by file name."""
    return {
        sample.metadata["file"]: next((span.text for span in sample.spans if span.modality == "text"), None)
        for sample in ShardReader(out / split)
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def reasons(report: FolderReport) -> dict[str, list[str]]:
    """Names by reason, where all are shown."""
    entries = report.skipped.to_json().items()
    assert all(entry["count"] == len(entry["first"]) for _, entry in entries)
    return {reason: entry["first"] for reason, entry in entries}
