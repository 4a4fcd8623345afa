"""The cells of the any-to-any suite as a heat map and tables for a page, and as text for a terminal."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omniform.page import interval, percent, table, text_columns

Cells = Mapping[str, Mapping[str, Any]]
_ORDER = ("text", "image", "speech", "video")
_HEAD = ("accuracy", "95% interval", "n", "chance", "ceiling", "of ceiling", "copies (held-out; train)")
_PARTS = {"digit": "digit", "motion": "motion", "held_out_pairs": "held-out pairs", "second_judge": "second judge"}
# Five points of cividis (arXiv:1712.01662), which looks alike with and without colour blindness, dark to bright.
_COLOURS = ((0, 32, 77), (65, 77, 107), (124, 123, 120), (188, 175, 111), (255, 234, 70))
_OF_PARTS = "accuracy of ceiling (number of items), of each thing that a cell is to say"
_LEGEND = (0.0, 0.25, 0.5, 0.7, 0.85, 0.93, 1.0)


def cells_as_text(metrics: Mapping[str, Any]) -> str:
    """Return what metrics.json says of its cells, and of documents, as tables for a terminal."""
    cells: Cells = metrics["cells"]
    names = modalities_of(metrics)
    lines = [f"accuracy on {metrics['split']} (of ceiling), from rows to columns"]
    lines += text_columns([("", *names), *([source, *_row(cells, source, names)] for source in names)])
    if summary := _summary(cells):
        lines.append(summary)
    ways = {name: ", ".join(cell["through"]) for name, cell in cells.items() if cell.get("through")}
    for way in sorted({*ways.values()}):
        lines.append(f"by way of {way}: {', '.join(name for name, own in ways.items() if own == way)}")
    lines += [f"not scored, {reason}: {', '.join(missing)}" for reason, missing in _unscored(metrics).items()]
    lines += ["", *text_columns([("cell", *_HEAD), *((name, *_figures(cell)) for name, cell in cells.items())])]
    if parts := _part_rows(cells):
        lines += ["", f"{_OF_PARTS}:", *text_columns([("cell", *_PARTS.values()), *parts])]
    for kind, figures in metrics.get("documents", {}).items():
        told = ", ".join(f"{name} {percent(figure['accuracy'])}" for name, figure in figures.items())
        lines.append(f"documents, {kind}: {told} of {next(iter(figures.values()))['n']}")
    return "\n".join(line.rstrip() for line in lines)


def cells_section(metrics: Mapping[str, Any]) -> str:
    """Return in HTML the heat map of metrics.json's cells, and what else it says of them."""
    cells: Cells = metrics["cells"]
    return (
        f"<h2>How well</h2>{_heat_map(metrics)}{_legend()}"
        '<p class="note">Each cell goes from what is given (row) to what is made of it (column), and leads to its '
        "samples. Right is what says the same digit, and the same motion where both sides tell one. A text, picture or "
        "recording that only repeats its source is wrong; a clip must begin where the given one ended, so repeating it "
        "is right only where it stands still. Judges never see held-out data or replies while they are fitted. The "
        "ceiling is the judge's own accuracy on real held-out items by the same criterion; what is easier to "
        f"recognise can lie above it.</p>{_judges(metrics)}{_parts(cells)}{_controls(cells)}{_figure_table(cells)}"
        f"{_per_class(cells)}"
    )


def of_ceilings(cells: Cells) -> tuple[int, float, str, float] | None:
    """Return of how many cells the fraction of the ceiling is known, its mean, and where it is lowest and how low; None
    where it is known of none."""
    known = {name: float(ratio) for name, cell in cells.items() if (ratio := cell["of_ceiling"]) is not None}
    if not known:
        return None
    lowest = min(known, key=lambda name: known[name])
    return len(known), sum(known.values()) / len(known), lowest, known[lowest]


def modalities_of(metrics: Mapping[str, Any]) -> list[str]:
    """Return the modalities that the cells of metrics.json go from and to: the usual four first, in their order."""
    named = [side for cell in metrics["cells"] for side in cell.split("->")]
    return [name for name in _ORDER if name in named] + sorted(set(named) - set(_ORDER))


def arrow(cell: str) -> str:
    """Return the name of a cell in HTML."""
    return html.escape(cell).replace("-&gt;", " &rarr; ")


def anchor(cell: str) -> str:
    """Return where on the page the samples of a cell are."""
    return "samples-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in cell.replace("->", "-to-"))


def cell_colours(fraction: float) -> tuple[str, str]:
    """Return (background, ink) of a cell as CSS colours; the ink is the one of black and white that is read better.

    Colours part faster towards the ceiling, where cells differ: they follow the square of `fraction`.

    Args:
        fraction: of the ceiling, clipped to [0, 1].
    """
    place = min(max(fraction, 0.0), 1.0) ** 2 * (len(_COLOURS) - 1)
    below = min(int(place), len(_COLOURS) - 2)
    shade = [round(a + (place - below) * (b - a)) for a, b in zip(*_COLOURS[below : below + 2], strict=True)]
    return _css(shade), max("#000000", "#ffffff", key=lambda ink: contrast(_css(shade), ink))


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours "#rrggbb" as WCAG 2 defines it, from 1 to 21."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    levels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return sum(weight * level for weight, level in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _css(shade: Iterable[int]) -> str:
    return "#" + "".join(f"{level:02x}" for level in shade)


def _row(cells: Cells, source: str, names: Sequence[str]) -> Iterable[str]:
    for target in names:
        cell = cells.get(f"{source}->{target}")
        yield "not scored" if cell is None else f"{percent(cell['accuracy'])} ({percent(cell['of_ceiling'], 0)})"


def _summary(cells: Cells) -> str:
    found = of_ceilings(cells)
    if found is None:
        return ""
    n, mean, lowest, least = found
    return f"of ceiling: mean {percent(mean)} of {n} cells, lowest {lowest} {percent(least)}"


def _figures(cell: Mapping[str, Any]) -> tuple[str, ...]:
    figures = (percent(cell["accuracy"]), interval(cell["ci95"]), str(cell["n"]), percent(cell["chance"]))
    return (*figures, percent(cell["ceiling"]), percent(cell["of_ceiling"]), _copies(cell))


def _copies(cell: Mapping[str, Any]) -> str:
    if cell["copy_rate"] is None:
        return "-"
    return f"{percent(cell['copy_rate'])} ({percent(cell['copy_rate_held_out'])}; {percent(cell['copy_rate_train'])})"


def _part_rows(cells: Cells) -> list[tuple[str, ...]]:
    """Return what each cell says of the parts of what counts, of those cells that say any of it."""
    rows = [(name, *(_part(cell.get(part)) for part in _PARTS)) for name, cell in cells.items()]
    return [row for row in rows if any(entry != "-" for entry in row[2:])]


def _part(figure: Mapping[str, Any] | None) -> str:
    if not figure or figure["accuracy"] is None:
        return "-"
    ceiling = figure.get("ceiling")
    return f"{percent(figure['accuracy'])}{'' if ceiling is None else f' of {percent(ceiling)}'} ({figure['n']})"


def _unscored(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the cells without figures, by reason."""
    by_reason: dict[str, list[str]] = {}
    for entry in metrics.get("missing", ()):
        by_reason.setdefault(str(entry["reason"]), []).append(str(entry["cell"]))
    return by_reason


def _judges(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"not scored, {html.escape(reason)}: {', '.join(map(arrow, cells))}"
        for reason, cells in _unscored(metrics).items()
    ]
    parts += [
        html.escape(f"{name} is judged by: {judge['name']}")
        + (f"; fitted on {html.escape(str(judge['fitted_on']))}" if judge.get("fitted_on") else "")
        for name, judge in metrics.get("judges", {}).items()
    ]
    return f'<ul class="note">{"".join(f"<li>{part}</li>" for part in parts)}</ul>' if parts else ""


def _heat_map(metrics: Mapping[str, Any]) -> str:
    names = modalities_of(metrics)
    columns = "".join(f'<th scope="col">to {html.escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">from {html.escape(source)}</th>'
        f"{''.join(_heat(metrics, f'{source}->{target}') for target in names)}</tr>"
        for source in names
    )
    caption = f"Accuracy of each cell on {html.escape(metrics['split'])}; the colour is its fraction of the ceiling."
    return (
        f'<div class="scroll"><table class="heat"><caption>{caption}</caption>'
        f"<thead><tr><td></td>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _heat(metrics: Mapping[str, Any], name: str) -> str:
    cell = metrics["cells"].get(name)
    if cell is None or cell["accuracy"] is None:
        reasons = [reason for reason, missing in _unscored(metrics).items() if name in missing]
        return f'<td class="none">not scored<span>{html.escape(", ".join(reasons) or "not asked for")}</span></td>'
    ratio = cell["of_ceiling"]
    background, ink = cell_colours(ratio or 0.0)
    told = (
        f"<b>{percent(cell['accuracy'])}</b><span>{percent(ratio)} of ceiling {percent(cell['ceiling'])}</span>"
        f"<span>95%: {interval(cell['ci95'])}</span><span>n {cell['n']}, chance {percent(cell['chance'])}</span>"
    )
    if cell.get("through"):
        told += f"<span>by way of {html.escape(', '.join(cell['through']))}</span>"
    return f'<td style="background:{background};color:{ink}"><a href="#{anchor(name)}">{told}</a></td>'


def _legend() -> str:
    swatches = "".join(
        '<span style="background:{};color:{}">{}</span>'.format(*cell_colours(ratio), percent(ratio, 0))
        for ratio in _LEGEND
    )
    return f'<div class="scale">of the ceiling: {swatches} and above</div>'


def _parts(cells: Cells) -> str:
    rows = [(arrow(name), *entries) for name, *entries in _part_rows(cells)]
    if not rows:
        return ""
    judges = sorted({str(judge["name"]) for cell in cells.values() if (judge := cell.get("second_judge"))})
    second = f" The second judge of speech is {html.escape(', '.join(judges))}." if judges else ""
    goes_on = [
        f"{arrow(name)} begins where the given clip ended in {percent(own['accuracy'])} of {own['n']} (95%: "
        f"{interval(own['ci95'])}; real clips: {percent(own['ceiling'])}; after another clip than the given one: "
        f"{percent(own['shuffled']['accuracy'])})"
        for name, cell in cells.items()
        if (own := cell.get("continues"))
    ]
    return (
        "<h3>Digit and motion</h3>"
        + table(("", *_PARTS.values()), rows, f"{_OF_PARTS.capitalize()}.")
        + '<p class="note">Held-out pairs are digits with motions that training never shows together; both must be '
        f"right.{second}{''.join(f' {told}.' for told in goes_on)}</p>"
    )


def _controls(cells: Cells) -> str:
    rows = []
    for name, cell in cells.items():
        controls = cell.get("controls") or {}
        told = [percent((controls.get(control) or {}).get("accuracy")) for control in ("shuffled", "noise")]
        rates = (percent(cell.get("copy_of_source_rate")), _copies(cell))
        rows.append((arrow(name), percent(cell["accuracy"]), percent(cell["chance"]), *told, *rates))
    head = ("", "accuracy", "chance", "shuffled", "noise", "repeats its source", "copies (held-out; train)")
    caption = "What would be right without understanding, and how often the model repeats what it met."
    return (
        f"<h3>Controls</h3>{table(head, rows, caption)}"
        '<p class="note">Shuffled: the replies, judged by the labels of other items. Noise: the judge\'s answers to '
        "noise. A copy is nearer to something that training showed, altered ones too, than 95% of original training "
        "items are to one another; beside it stands how often that is so for real held-out ones, which is a false "
        "alarm, and for real training ones, which is how many copies would be found. Of clips, only those that "
        "move may not repeat their source.</p>"
    )


def _figure_table(cells: Cells) -> str:
    head = ("", *_HEAD[:-1], "mean over digits")
    rows = [(arrow(name), *_figures(cell)[:-1], percent(cell.get("macro_accuracy"))) for name, cell in cells.items()]
    caption = "The figures of the heat map once more."
    return f"<details><summary>The heat map as a table</summary>{table(head, rows, caption)}</details>"


def _per_class(cells: Cells) -> str:
    digits = sorted({digit for cell in cells.values() for digit in cell["per_class"]})
    rows = [
        (arrow(name), *(_of_class(cell["per_class"].get(digit)) for digit in digits)) for name, cell in cells.items()
    ]
    shown = table(("", *map(html.escape, digits)), rows, "Accuracy by digit, and of how many.")
    return f"<details><summary>By digit</summary>{shown}</details>"


def _of_class(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else f"{percent(figure['accuracy'], 0)} <small>of {figure['n']}</small>"
