"""What `omniform data info` prints for people: a row per folder of shards."""

from collections.abc import Mapping
from typing import Any

from omniform.page import text_columns

_ORDER = ("text", "image", "speech", "video")
_SECONDS = ("speech", "video")


def info_as_text(found: Mapping[str, Any]) -> str:
    """Return what `omniform.data.inspect.info` found as a table for a terminal: per folder its samples, shards, size,
    spans by modality and seconds of sound and video; then what cannot be read or has no caption, if anything.
    """
    splits: Mapping[str, Mapping[str, Any]] = found["splits"]
    names = {name for summary in splits.values() for name in summary["spans"]}
    modalities = [name for name in _ORDER if name in names] + sorted(names - {*_ORDER})
    timed = [name for name in _SECONDS if name in names]
    about = [f"{key} {value}" for key, value in found.items() if isinstance(value, str | int) and key != "folder"]
    head = ("folder", "samples", "shards", "MB", *modalities, *(f"{name}, s" for name in timed))
    rows = [
        (
            name or ".",
            *(f"{summary[key]:,}" for key in ("samples", "shards")),
            f"{summary['bytes'] / 1e6:.1f}",
            *(_count(summary["spans"].get(modality)) for modality in modalities),
            *(_count(summary.get(f"{modality}_seconds")) for modality in timed),
        )
        for name, summary in splits.items()
    ]
    lines = [": ".join([found["folder"], *([", ".join(about)] if about else [])]), "", *text_columns([head, *rows]), ""]
    for name, summary in splits.items():
        if summary["uncaptioned"]:
            lines.append(f"{name}: {summary['uncaptioned']:,} uncaptioned, with an image and no text")
        for reason, entry in summary.get("unreadable", {}).items():
            lines.append(f"{name}: {entry['count']:,} cannot be read: {reason}: {', '.join(entry['first'])}")
    lines.append("--json tells the sizes, rates and digits in each folder too, and the sources where they are known")
    return "\n".join(line.rstrip() for line in lines)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
