"""The report on one tokenizer: its figures as text, and as a page with what went in beside what came back."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omniform.data.sealed import write_atomically
from omniform.page import data_url, interval, number, page, percent, shortened, table, text_columns, tiles

REPORT = "report.html"
_WORDS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "si": "SI",
    "sdr": "SDR",
    "db": "dB",
    "fps": "frames per second",
    "ci95": "95%",
}
_KINDS = {
    "as it came": "As they came: the first",
    "lost": "Lost: the judge knew the original, and not what came back",
    "worst": "Worst by distortion",
    "best": "Best by distortion",
}
_SIDES = ("before", "after")
_LONGEST_TEXT, _LED_BY = 200, 40  # characters of a text that are shown, and of those before the first that has changed
_IN_TITLE = ("modality", "kind", "folder", "n")


def write_tokenizer_report(folder: Path) -> Path:
    """Write report.html beside what an evaluation wrote into `folder`, and return its path."""
    figures = _figures(folder)
    title = _title(figures)
    lead = (
        f"<header><h1>{html.escape(title)}</h1><p>{figures['n']} held-out items of {html.escape(figures['folder'])}, "
        f"encoded and decoded.</p>{tiles(_tiles(figures))}</header>"
    )
    path = folder / REPORT
    write_atomically(path, page(title, [lead, tokenizer_section(folder)]).encode())
    return path


def tokenizer_section(folder: Path) -> str:
    """Return in HTML what an evaluation wrote into `folder`: figures, the judge's word, and items before and after."""
    figures = _figures(folder)
    parts = [table(("figure", ""), [_escaped((label, number(value))) for label, value in _plain(figures)])]
    for name, judge in _judges(figures):
        parts.append(f"<h4>{html.escape(_label(name))}</h4><p>{_verdict(judge)}</p>")
        shown = [table((html.escape(group), *_SIDES, "n"), map(_escaped, rows)) for group, rows in _tables(judge)]
        parts.append(f'<div class="tables">{"".join(shown)}</div>')
        if told := _confusions(judge):
            parts.append(f'<p class="note">Most often wrong after the round trip: {html.escape(told)}.</p>')
    parts += [
        '<p class="note">Above or at the left held-out originals, below or at the right what comes back.</p>'
        f'<p><img class="wide" src="{data_url(picture)}" alt="{html.escape(picture.stem)}"></p>'
        for picture in (folder / f"reconstructions.{extension}" for extension in ("png", "gif"))
        if picture.exists()
    ]
    return "".join(parts) + _examples(folder)


def figures_as_text(figures: Mapping[str, Any]) -> str:
    """Return the content of tokenizer.json as tables for a terminal."""
    lines = [f"{_title(figures)}: {figures['n']} items of {figures['folder']}", ""]
    lines += text_columns([(label, number(value)) for label, value in _plain(figures)])
    for name, judge in _judges(figures):
        rows = [(f"{group} {first}", *rest) for group, rows in _tables(judge) for first, *rest in rows]
        lines += ["", f"{_label(name)}: {_verdict(judge)}", *text_columns([("", *_SIDES, "n"), *rows])]
        if told := _confusions(judge):
            lines.append(f"most often wrong: {told}")
    return "\n".join(line.rstrip() for line in lines)


def _figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def _title(figures: Mapping[str, Any]) -> str:
    return f"Tokenizer of {figures['modality']} ({figures['kind']})"


def _label(key: str) -> str:
    if key == "judge":
        return "digit judge"
    return " ".join(_WORDS.get(word, word) for word in key.split("_"))


def _plain(figures: Mapping[str, Any]) -> Iterable[tuple[str, float | str]]:
    """Yield the figures that are one number or word each, and those of each codebook."""
    for key, value in figures.items():
        if isinstance(value, int | float | str) and key not in _IN_TITLE:
            yield _label(key), value
    for place, book in enumerate(figures.get("by_codebook", ())):
        yield from ((f"codebook {place}: {_label(key)}", value) for key, value in book.items())


def _judges(figures: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(key, value) for key, value in figures.items() if isinstance(value, Mapping) and "per_class" in value]


def _verdict(judge: Mapping[str, Any]) -> str:
    before, after, ratio = (
        f"{percent(judge[key])} [{interval(judge[f'ci95_{name}'])}]"
        for key, name in (("accuracy_before", "before"), ("accuracy_after", "after"), ("ratio", "ratio"))
    )
    sources = "" if judge["n_sources"] == judge["n"] else f" from {judge['n_sources']} sources"
    return f"right on {before} of {judge['n']} originals{sources} and on {after} of what came back: {ratio}"


def _tables(judge: Mapping[str, Any]) -> Iterable[tuple[str, list[tuple[str, ...]]]]:
    """Yield ("class", rows), and the same of each group that there is."""
    for key, entries in judge.items():
        if key == "per_class" or key.startswith("by_"):
            rows = [
                (name, *(percent(own[f"accuracy_{side}"]) for side in _SIDES), str(own["n"]))
                for name, own in entries.items()
            ]
            yield "class" if key == "per_class" else key.removeprefix("by_"), rows


def _confusions(judge: Mapping[str, Any]) -> str:
    return ", ".join(f"{entry['right']} as {entry['judged']} ({entry['n']})" for entry in judge["confusions"])


def _escaped(row: Sequence[str]) -> list[str]:
    return [html.escape(entry) for entry in row]


def _tiles(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    wanted = ("tokens_per_second", "tokens_per_item", "bits_per_second", "bits_per_item", "channels")
    rates = [(number(figures[key]), _label(key)) for key in wanted if key in figures][:2]
    judged = [
        (percent(judge["accuracy_after"]), f"{_label(name)}<br>{percent(judge['accuracy_before'])} of originals")
        for name, judge in _judges(figures)
    ]
    return [*judged, *rates]


def _examples(folder: Path) -> str:
    path = folder / "examples.json"
    if not path.exists():
        return ""
    entries = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for kind, title in _KINDS.items():
        if shown := [_example(entry, folder / "examples") for entry in entries if entry["kind"] == kind]:
            of_classes = " of each class" if kind == "as it came" and any(map(_said, entries)) else ""
            parts.append(f'<h4>{html.escape(title + of_classes)}</h4><div class="grid broad">{"".join(shown)}</div>')
    return "".join(parts)


def _example(entry: Mapping[str, Any], folder: Path) -> str:
    """Show an item: players and pictures of the files that there are, what judges say, and texts about where they
    part."""
    words = [f"{key.replace('_', ' ')} {value}" for key, value in entry.items() if key in ("digit", "voice", "motion")]
    media = [
        f'{side}<audio controls preload="none" src="{data_url(folder / entry[side])}"></audio>'
        for side in _SIDES
        if side in entry
    ]
    if "before_text" in entry:
        texts = [entry[f"{side}_text"] for side in _SIDES]
        parting = (place for place, (a, b) in enumerate(zip_longest(*texts)) if a != b)
        start = max(0, next(parting, 0) - _LED_BY)
        words += [f"{side}: {shortened(text[start:], _LONGEST_TEXT)}" for side, text in zip(_SIDES, texts, strict=True)]
    if "picture" in entry:
        kind = "spectrogram" if "before" in entry else "film"
        media.append(f'<img class="{kind}" src="{data_url(folder / entry["picture"])}" alt="before and after">')
    judged = _said(entry)
    wrong = any(said["after"] != said["right"] for said in judged.values())
    verdicts = [f"{_label(name)}: {said['before']}, then {said['after']}" for name, said in judged.items()]
    told = "".join(f"<br><em>{html.escape(verdict)}</em>" for verdict in verdicts)
    return (
        f"<figure{' class=wrong' if wrong else ''}>{''.join(media)}<figcaption>{html.escape(', '.join(words))}{told}"
        "</figcaption></figure>"
    )


def _said(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what each judge says of an example; nothing where there are no judges."""
    return {key: value for key, value in entry.items() if isinstance(value, Mapping)}
