"""The demo's report: one HTML file that needs nothing else, and the figures as plain text."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniform.data.sealed import write_atomically
from omniform.page import data_url, interval, page, percent, shortened, table, text_columns, tiles
from omniform.tokenizer_report import tokenizer_section

REPORT = "report.html"
_N_PER_DIGIT = 2


def write_report(folder: Path, commands: Sequence[str], note: str = "") -> Path:
    """Write report.html from what the demo left in `folder`, and return its path.

    Args:
        folder: holds metrics.json, samples.json, stages.json, and documents.json, log.jsonl files and tokenizer
            figures where there are any.
        commands: what repeats the run, shown as it is.
        note: what a reader must know before the figures.
    """
    metrics, samples = _read_json(folder / "metrics.json"), _read_json(folder / "samples.json")
    stages = _read_json(folder / "stages.json")
    sections = [
        _headline(metrics, stages, note),
        _drawn(folder / "samples" / "images.png"),
        _cells(metrics),
        _samples(samples),
        _documents(metrics, folder / "documents.json"),
        _tokenizers(folder),
        _curves(folder),
        _stages(stages),
        f"<h2>How to repeat it</h2><pre>{html.escape(chr(10).join(commands))}</pre>",
    ]
    path = folder / REPORT
    write_atomically(path, page("Omniform demo report", sections).encode())
    return path


def cells_as_text(metrics: Mapping[str, Any]) -> str:
    """Return the cells of metrics.json as a table for a terminal."""
    rows = [("cell", "accuracy", "95% interval", "n", "chance", "ceiling", "of ceiling", "copies (real held-out)")]
    rows += [(name, *_figures(cell)) for name, cell in metrics["cells"].items()]
    lines = text_columns(rows)
    for kind, figures in metrics.get("documents", {}).items():
        told = ", ".join(f"{name} {percent(figure['accuracy'])}" for name, figure in figures.items())
        lines.append(f"documents, {kind}: {told} of {next(iter(figures.values()))['n']}")
    return "\n".join(lines)


def _figures(cell: Mapping[str, Any]) -> tuple[str, ...]:
    copies = "-"
    if cell["copy_rate"] is not None:
        copies = f"{percent(cell['copy_rate'])} ({percent(cell['copy_rate_held_out'])})"
    ratio = percent(cell["accuracy"] / cell["ceiling"]) if cell["ceiling"] else "-"
    figures = (percent(cell["accuracy"]), interval(cell["ci95"]), str(cell["n"]), percent(cell["chance"]))
    return (*figures, percent(cell["ceiling"]), ratio, copies)


def _headline(metrics: Mapping[str, Any], stages: Mapping[str, Any], note: str) -> str:
    cells = metrics["cells"]
    entries = [
        (percent(cell["accuracy"]), f"{_arrow(name)}<br>ceiling {percent(cell['ceiling'])}")
        for name, cell in cells.items()
    ]
    entries.append((_duration(sum(stage["seconds"] for stage in stages.values())), "from nothing to<br>this report"))
    entries.append((f"{max(stage['peak_mib'] for stage in stages.values()) / 1024:.1f} GiB", "peak memory"))
    return (
        "<header><h1>One small transformer, trained here</h1><p>It learnt from scratch, on this machine, to draw "
        "handwritten digits from captions and to caption drawings. Everything below was measured on the "
        f"{html.escape(metrics['split'])} split: wordings, and blocks of drawings (a proxy for writers), that it never "
        "saw.</p>"
        f"{f'<p><strong>{html.escape(note)}</strong></p>' if note else ''}{tiles(entries)}</header>"
    )


def _drawn(picture: Path) -> str:
    if not picture.exists():
        return ""
    return (
        f'<p><img class="wide" src="{data_url(picture)}" alt="digits that the model drew"></p>'
        '<p class="note">From zero to nine, each drawn from a caption in words that training never put together so.</p>'
    )


def _cells(metrics: Mapping[str, Any]) -> str:
    cells = metrics["cells"]
    head = ("", "accuracy", "95% interval", "n", "chance", "ceiling", "of ceiling", "copies (real held-out)")
    digits = sorted({digit for cell in cells.values() for digit in cell["per_class"]})
    by_digit = [
        (_arrow(name), *(percent(own[d]["accuracy"], 0) if d in own else "-" for d in digits))
        for name, own in ((name, cell["per_class"]) for name, cell in cells.items())
    ]
    return (
        "<h2>How well</h2>"
        + table(head, [(_arrow(name), *_figures(cell)) for name, cell in cells.items()])
        + '<p class="note">The judge is a classifier fitted on the training drawings only. The ceiling is its own '
        "accuracy on real held-out drawings; drawings that are easier to read can lie above it. A copy is a generated "
        "drawing nearer to one that training showed, altered ones too, than 95% of original training drawings are to "
        "one another; beside it stands how often that is so for real held-out ones.</p>"
        + "<h3>By digit</h3>"
        + table(("", *digits), by_digit)
    )


def _samples(samples: Mapping[str, Any]) -> str:
    """Show the first replies to each digit, and all others folded away."""
    parts = ["<h2>Samples</h2>", '<p class="note">As they came, with the failures; none was chosen by hand.</p>']
    for name, entries in samples.items():
        first: list[Mapping[str, Any]] = []
        others: list[Mapping[str, Any]] = []
        for digit in sorted({entry["digit"] for entry in entries}):
            own = [entry for entry in entries if entry["digit"] == digit]
            first += own[:_N_PER_DIGIT]
            others += own[_N_PER_DIGIT:]
        parts.append(f'<h3>{_arrow(name)}</h3><div class="grid">{"".join(map(_sample, first))}</div>')
        if others:
            n_wrong = sum(entry["judged"] != entry["digit"] for entry in others)
            parts.append(
                f"<details><summary>The other {len(others)} of the first {len(entries)}, {n_wrong} of them wrong"
                f'</summary><div class="grid">{"".join(map(_sample, others))}</div></details>'
            )
    return "".join(parts)


def _sample(entry: Mapping[str, Any]) -> str:
    wrong = entry["judged"] != entry["digit"]
    verdict = "no digit named" if entry["judged"] is None else f"judged {entry['judged']}"
    expected = f", expected {entry['digit']}" if wrong else ""
    shown = f"<em>{'wrong' if wrong else 'right'}: {verdict}{expected}</em>"
    pictures = "".join(f'<img src="{html.escape(p["image"])}" alt="">' for p in _sides(entry) if "image" in p)
    texts = " &rarr; ".join(html.escape(shortened(p["text"])) for p in _sides(entry) if "text" in p)
    return f"<figure{' class=wrong' if wrong else ''}>{pictures}<figcaption>{texts}<br>{shown}</figcaption></figure>"


def _documents(metrics: Mapping[str, Any], path: Path) -> str:
    """Show how the model goes on with documents of texts and pictures, where it was asked to."""
    if "documents" not in metrics:
        return ""
    rows = []
    for kind, figures in metrics["documents"].items():
        for name, figure in figures.items():
            others = ("-" if figure[key] is None else percent(figure[key]) for key in ("chance", "ceiling"))
            rows.append(
                (
                    html.escape(f"{kind}: {name}"),
                    percent(figure["accuracy"]),
                    interval(figure["ci95"]),
                    str(figure["n"]),
                    *others,
                )
            )
    shown = "".join(map(_document, _read_json(path)))
    return (
        "<h2>Documents of texts and pictures</h2>"
        + table(("", "accuracy", "95% interval", "n", "chance", "ceiling"), rows)
        + '<p class="note">counting: given a text and a picture, is the next digit named, is it drawn, do both agree? '
        "naming: given a text that names no digit, is the real picture after it read, and does the model's text name "
        "what it has drawn there itself, with no digit asked for? (That drawing is often no digit: the drawing fails, "
        "not the reading.) free: given "
        "the first text, the model chooses what comes and when to end. Below, what was given stands before the bar; "
        "the first of each kind, as they came.</p>"
        f'<div class="documents">{shown}</div>'
    )


def _document(entry: Mapping[str, Any]) -> str:
    def cells(parts: Sequence[Mapping[str, str]]) -> str:
        return "".join(
            f'<img src="{html.escape(part["image"])}" alt="">'
            if "image" in part
            else f"<span>{html.escape(shortened(part['text']))}</span>"
            for part in parts
        )

    verdict = f"<em>{html.escape(entry['kind'])}: {'right' if entry['right'] else 'wrong'}</em>"
    return (
        f"<figure{'' if entry['right'] else ' class=wrong'}><div class=turns>{cells(entry['prompt'])}<b>|</b>"
        f"{cells(entry['reply'])}</div><figcaption>{verdict}</figcaption></figure>"
    )


def _sides(entry: Mapping[str, Any]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    return entry["prompt"], entry["reply"]


def _tokenizers(folder: Path) -> str:
    evaluations = sorted(figures.parent for figures in folder.glob("tokenizers/*/evaluation/tokenizer.json"))
    sections = [f"<h3>{html.escape(path.parent.name)}</h3>{tokenizer_section(path)}" for path in evaluations]
    note = '<p class="note">What turns data into tokens and back. The model above uses those of text and images.</p>'
    return f"<h2>Tokenizers</h2>{note}{''.join(sections)}" if sections else ""


def _curves(folder: Path) -> str:
    charts, notes = [], []
    for log in sorted(folder.rglob("log.jsonl")):
        run = log.parent.relative_to(folder).as_posix()
        series: dict[str, list[tuple[float, float]]] = {}
        stages: dict[str, int] = {}
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "stage" in record:
                stages[record["stage"]] = record["step"]
            for key, value in record.items():
                if key.startswith("loss/") and value is not None:
                    series.setdefault(key.removeprefix("loss/"), []).append((record["step"], value))
        charts += [line_chart(points, f"{run}: {name}") for name, points in series.items()]
        if stages:
            told = ", ".join(f"{html.escape(name)} to step {last}" for name, last in stages.items())
            notes.append(f'<p class="note">Stages of {html.escape(run)}: {told}.</p>')
    shown = f'<h2>Loss while training</h2>{"".join(notes)}<div class="charts">{"".join(charts)}</div>'
    parts = [shown] if charts else []
    pictures = sorted(folder.glob("run/samples/step-*/images.png"), key=lambda path: int(path.parent.name[5:]))
    if pictures:
        parts.append('<h3>What the model drew on the way</h3><p class="note">The same prompts and noise each time.</p>')
    for picture in pictures:
        step = html.escape(picture.parent.name.replace("-", " "))
        parts.append(f'<p>{step}<br><img class="wide" src="{data_url(picture)}" alt="samples at {step}"></p>')
    return "".join(parts)


def _stages(stages: Mapping[str, Any]) -> str:
    rows = [
        (html.escape(name), _duration(stage["seconds"]), f"{stage['peak_mib']:,.0f} MiB")
        for name, stage in stages.items()
    ]
    return f"<h2>Time and memory</h2>{table(('stage', 'time', 'peak memory so far'), rows)}"


def line_chart(points: Sequence[tuple[float, float]], title: str) -> str:
    """Return an inline SVG of one curve through (step, value) points, with labelled axes."""
    width, height, left, right, top, bottom = 360, 210, 46, 14, 30, 26
    (first, last), (low, high) = _span(x for x, _ in points), _span(y for _, y in points)
    ticks = round_ticks(low, high)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - first) / (last - first) * (width - left - right)
        return across, top + (high - y) / (high - low) * (height - top - bottom)

    rules = "".join(
        f'<line x1="{left}" x2="{width - right}" y1="{place(first, tick)[1]:.1f}" y2="{place(first, tick)[1]:.1f}"/>'
        f'<text x="{left - 6}" y="{place(first, tick)[1] + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    ends = (
        f'<text x="{left}" y="{height - 8}">step {points[0][0]:g}</text>'
        f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{points[-1][0]:g}</text>'
        f'<text x="{width - right}" y="18" text-anchor="end">last {points[-1][1]:.3g}</text>'
    )
    label = html.escape(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><text class="title" x="12" y="18">{label}'
        f'</text>{rules}<path d="M{path}"/>{ends}</svg>'
    )


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Return the smallest and largest value, kept apart so that an axis has a length."""
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def round_ticks(low: float, high: float) -> list[float]:
    """Return two to six round values that lie in [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _arrow(cell: str) -> str:
    return html.escape(cell).replace("-&gt;", " &rarr; ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
