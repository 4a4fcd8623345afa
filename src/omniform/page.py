"""The parts of a page that needs nothing else: style, tables, figures in words, files as data URLs."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from omniform.errors import OmniformError

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #5c6570; --paper: #ffffff; --panel: #f4f6f8;
  --line: #dde2e7; --accent: #2563c9; --right: #1a7f45; --wrong: #c2372b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --quiet: #9aa4af; --paper: #14171b; --panel: #1d2126;
  --line: #333a42; --accent: #74a7f7; --right: #53c283; --wrong: #f08379; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
section { scroll-margin-top: 1rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p, .note { max-width: 46rem; } ul.note, ol.note { padding-left: 1.2rem; }
.note { color: var(--quiet); font-size: .92rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.tile { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; white-space: nowrap; }
.tile span { color: var(--quiet); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; font-size: .88rem; } th:first-child, td:first-child { text-align: left; }
tbody th { color: var(--ink); font-weight: 400; font-size: 1rem; }
caption { text-align: left; color: var(--quiet); font-size: .92rem; padding-bottom: .3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.8rem, 1fr)); gap: .6rem; margin: .5rem 0; }
figure { margin: 0; padding: .5rem; background: var(--panel); border-radius: .5rem;
  border-left: 4px solid var(--right); }
figure.wrong { border-left-color: var(--wrong); }
figure img { width: 64px; height: 64px; image-rendering: pixelated; display: block; border-radius: .25rem; }
figcaption { font-size: .82rem; line-height: 1.35; margin-top: .35rem; overflow-wrap: anywhere; }
figure audio { width: 100%; height: 2rem; display: block; margin: .15rem 0; }
figure .spectrogram { width: 100%; height: 6rem; } figure .film { width: auto; height: 64px; }
figcaption em { font-style: normal; font-weight: 600; color: var(--right); } .wrong em { color: var(--wrong); }
figure .pair { display: flex; flex-wrap: wrap; align-items: center; gap: .45rem; }
.pair div { display: flex; align-items: center; gap: .45rem; }
.pair span, .turns span { font-size: .88rem; line-height: 1.35; } .pair b { color: var(--quiet); }
/* Higher than its picture by the controls, which then stand below it. */
video { width: 128px; height: 176px; object-fit: contain; object-position: top; image-rendering: pixelated;
  display: block; border-radius: .25rem; }
.pair img { width: 80px; height: 80px; }
.heat { border-collapse: separate; border-spacing: 3px; table-layout: fixed; width: 100%; min-width: 40rem; }
.heat th { text-align: center; border: 0; } .heat tbody th { font-weight: 600; width: 5.5rem; }
.heat td { padding: 0; border: 0; border-radius: .4rem; text-align: center; white-space: normal; }
.heat a { display: block; padding: .45rem .3rem; color: inherit; text-decoration: none; border-radius: .4rem; }
.heat a:hover b, .heat a:focus b { text-decoration: underline; }
.heat b { display: block; font-size: 1.3rem; line-height: 1.25; } .heat span { display: block; font-size: .78rem; }
.heat .none { background: var(--panel); border: 1px dashed var(--quiet); color: var(--quiet); padding: .4rem; }
.scale { display: flex; flex-wrap: wrap; gap: 3px; margin: .3rem 0 .8rem; font-size: .78rem; align-items: center; }
.scale span { padding: .1rem .55rem; border-radius: .25rem; }
.tables { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.grid.broad { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.documents { display: grid; gap: .5rem; margin: .5rem 0; }
.turns { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem; }
.turns audio, .pair audio { width: 11rem; flex: none; }
.media { display: flex; flex-wrap: wrap; gap: .8rem; margin: .4rem 0; } .media audio { width: 15rem; height: 2.2rem; }
.media video { width: 192px; height: 240px; } .media q { display: block; font-size: .88rem; }
.wide { max-width: 100%; image-rendering: pixelated; border-radius: .4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; background: var(--panel); border-radius: .5rem; }
svg path { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
svg path.thin { stroke-width: .9; }
svg line { stroke: var(--line); } svg line.stage { stroke: var(--quiet); stroke-dasharray: 3 3; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
svg .title { fill: var(--ink); font-weight: 600; font-size: 12.5px; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto; font-size: .88rem; }
details summary { cursor: pointer; color: var(--accent); }
"""

_TYPES = {
    ".png": "image/png",
    ".gif": "image/gif",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
    ".mp4": "video/mp4",
}
_ELEMENTS = {
    "image": '<img src="{url}" alt="{description}">',
    "audio": '<audio controls preload="metadata" src="{url}" aria-label="{description}"></audio>',
    "video": '<video controls loop muted autoplay playsinline src="{url}" aria-label="{description}"></video>',
}


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page of sections in HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return a table in HTML, of entries in HTML; the first entry of a row is its heading."""
    columns = "".join(f'<th scope="col">{entry}</th>' if entry else "<td></td>" for entry in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{entry}</td>" for entry in rest)}</tr>'
        for first, *rest in rows
    )
    told = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Return (value, label) pairs in HTML as a row of tiles."""
    shown = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in entries)
    return f'<div class="tiles">{shown}</div>'


def text_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line of text per row, in aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]


def data_url(file: Path) -> str:
    """Return a file of one of the formats that pages show and play as a data URL."""
    return f"data:{_TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"


def shortened(text: str, longest: int = 80) -> str:
    """Return at most `longest` characters of a text and "..." for others, all of which can be shown."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text[: longest + 1])
    return (shown if len(shown) <= longest else f"{shown[:longest]}...") or "(nothing)"


def medium(url: str, description: str) -> str:
    """Return what shows the picture or plays the sound or video of a data URL, in HTML.

    Args:
        description: for readers who do not see it.

    Raises:
        OmniformError: no data URL of a picture, sound or video: the page would refer to something outside.
    """
    kind = url.removeprefix("data:").partition("/")[0] if url.startswith("data:") else ""
    if kind not in _ELEMENTS:
        raise OmniformError(f"a page is to show {url[:40]!r}, expected a data URL of a picture, sound or video")
    return _ELEMENTS[kind].format(url=html.escape(url), description=html.escape(description))


def percent(value: float | None, decimals: int = 1) -> str:
    """Return a fraction as a percentage, "-" for none."""
    return "-" if value is None else f"{100 * value:.{decimals}f}%"


def interval(bounds: Sequence[float] | None) -> str:
    """Return an interval of fractions as percentages, "-" for none."""
    if bounds is None:
        return "-"
    low, high = bounds
    return f"{percent(low)} - {percent(high)}"


def number(value: float | int | str) -> str:
    """Return a figure, four digits of a fractional one."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
