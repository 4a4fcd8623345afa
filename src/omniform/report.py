"""The demo's report: one HTML file that needs nothing else."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omniform.cell_report import arrow, cells_section, modalities_of, of_ceilings
from omniform.charts import line_chart
from omniform.data.sealed import write_atomically
from omniform.page import data_url, interval, medium, page, percent, shortened, table, tiles
from omniform.sample_report import documents_grid, samples_section
from omniform.tokenizer_report import tokenizer_section

REPORT = "report.html"
_SHOWN = {"text": "text", "image": "pictures", "speech": "speech", "video": "video"}
_N_STEPS_SHOWN = 6


def write_report(folder: Path, commands: Sequence[str], note: str = "") -> Path:
    """Write report.html from what the demo left in `folder`, and return its path.

    Args:
        folder: holds metrics.json, samples.json, stages.json, and documents.json, log.jsonl files and tokenizer
            figures where there are any.
        commands: what repeats the run, shown as it is.
        note: what a reader must know before the figures.

    Raises:
        OmniformError: samples.json or documents.json name a picture, sound or video that they do not hold.
    """
    metrics, samples = _read_json(folder / "metrics.json"), _read_json(folder / "samples.json")
    stages = _read_json(folder / "stages.json")
    sections = [
        _headline(metrics, stages, note),
        _drawn(folder / "samples"),
        cells_section(metrics),
        samples_section(samples),
        _documents(metrics, folder / "documents.json"),
        _curves(folder),
        _on_the_way(folder / "run" / "samples"),
        _tokenizers(folder),
        _stages(stages),
        f"<h2>How to repeat it</h2><pre>{html.escape(chr(10).join(commands))}</pre>",
    ]
    path = folder / REPORT
    write_atomically(path, page("Omniform demo report", sections).encode())
    return path


def _headline(metrics: Mapping[str, Any], stages: Mapping[str, Any], note: str) -> str:
    cells = metrics["cells"]
    entries = []
    if found := of_ceilings(cells):
        n, mean, lowest, least = found
        entries += [
            (percent(mean), f"of the ceiling, mean<br>of {n} cells"),
            (percent(least), f"of the ceiling, lowest:<br>{arrow(lowest)}"),
        ]
    entries.append((_duration(sum(stage["seconds"] for stage in stages.values())), "from nothing to<br>this report"))
    entries.append((f"{max(stage['peak_mib'] for stage in stages.values()) / 1024:.1f} GiB", "memory at most"))
    *names, last = (html.escape(_SHOWN.get(name, name)) for name in modalities_of(metrics))
    return (
        "<header><h1>One small transformer, trained here</h1><p>It learnt from scratch, on this machine, to turn "
        f"{', '.join(names)} and {last} that tell of a digit into one another. Everything below was measured on the "
        f"{html.escape(metrics['split'])} split: wordings, voices and blocks of drawings (a proxy for writers) that it "
        "never met. Each way from one of these to one of these is a cell; its ceiling is what the judge gets right of "
        "the real data.</p>"
        f"{f'<p><strong>{html.escape(note)}</strong></p>' if note else ''}{tiles(entries)}</header>"
    )


def _drawn(folder: Path) -> str:
    shown = _preview(folder, "what the model made")
    if not shown:
        return ""
    return f'<p class="note">Made from words that training never put together so, which stand below.</p>{shown}'


def _preview(folder: Path, description: str) -> str:
    """Show what `draw_samples` left in a folder."""
    picture, record = folder / "images.png", folder / "prompts.json"
    prompts = _read_json(record) if record.exists() else {}  # runs of earlier versions have none
    files = sorted(file for kind in ("speech-*", "video-*") for file in folder.glob(kind))
    parts = []
    if picture.exists():
        parts.append(f'<p><img class="wide" src="{data_url(picture)}" alt="{html.escape(description)}: pictures"></p>')
        rows = (f"<li>{_row_prompts(row)}</li>" for row in prompts.get(picture.name, ()))
        parts.append(f'<p class="note">Row by row:</p><ol class="note">{"".join(rows)}</ol>' if prompts else "")
    if files:
        told = (_prompt(prompts[file.name]) if file.name in prompts else "" for file in files)
        players = (medium(data_url(file), f"{description}: {file.stem}") for file in files)
        shown = (f"<div>{player}{words}</div>" for player, words in zip(players, told, strict=True))
        parts.append(f'<div class="media">{"".join(shown)}</div>')
    return "".join(parts)


def _row_prompts(row: Sequence[str]) -> str:
    """Return the first and the last prompt of a row of pictures."""
    return " to ".join(map(_prompt, [row[0], row[-1]][: len(row)]))


def _prompt(words: str) -> str:
    return f"<q>{html.escape(shortened(words))}</q>" if words else "no prompt"


def _documents(metrics: Mapping[str, Any], path: Path) -> str:
    """Show how the model goes on with documents of several parts, where it was asked to."""
    if "documents" not in metrics:
        return ""
    rows = [
        (
            html.escape(f"{kind}: {name}"),
            *(percent(figure["accuracy"]), interval(figure["ci95"]), str(figure["n"])),
            *(percent(figure[key]) for key in ("chance", "ceiling")),
        )
        for kind, figures in metrics["documents"].items()
        for name, figure in figures.items()
    ]
    return (
        "<h2>Documents of texts and pictures</h2>"
        + table(("", "accuracy", "95% interval", "n", "chance", "ceiling"), rows)
        + '<p class="note">counting: given a text and a picture, is the next digit named, is it drawn, do both agree? '
        "naming: given a text that names no digit, is the real picture after it read, and does the model's text name "
        "what it has drawn there itself, with no digit asked for? (That drawing is often no digit: the drawing fails, "
        "not the reading.) free: given "
        "the first text, the model chooses what comes and when to end. Below, what was given stands before the bar; "
        "the first of each kind, as they came.</p>" + documents_grid(_read_json(path))
    )


def _tokenizers(folder: Path) -> str:
    evaluations = sorted(figures.parent for figures in folder.glob("tokenizers/*/evaluation/tokenizer.json"))
    sections = [
        f"<h3>{html.escape(path.parent.name)}</h3>{tokenizer_section(path)}{_folded_curves(path.parent)}"
        for path in evaluations
    ]
    note = '<p class="note">What turns data into tokens and back.</p>'
    return f"<h2>Tokenizers</h2>{note}{''.join(sections)}" if sections else ""


def _folded_curves(run: Path) -> str:
    if not (run / "log.jsonl").exists():
        return ""
    shown = "".join(_charts(_read_log(run / "log.jsonl")))
    return f'<details><summary>Its training</summary><div class="charts">{shown}</div></details>' if shown else ""


def _curves(folder: Path) -> str:
    log = folder / "run" / "log.jsonl"
    records = _read_log(log) if log.exists() else []
    charts = _charts(records)
    if not charts:
        return ""
    told = ", ".join(f"{html.escape(name)} to step {last}" for name, last in _stages_of(records).items())
    return (
        '<h2>Training</h2><p class="note">The loss of each modality on training data, and of choosing what comes next '
        f"where the model learns that (next_span).{f' Dashed lines part the stages: {told}.' if told else ''}</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _charts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a chart of each loss of a run, and one of its learning rate, over the same steps."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("loss/") and value is not None:
                series.setdefault(key.removeprefix("loss/"), []).append((record["step"], value))
    if not series:
        return []
    steps, stages = (records[0]["step"], records[-1]["step"]), _stages_of(records)
    names = [name for name in _SHOWN if name in series] + [name for name in series if name not in _SHOWN]
    charts = [line_chart(series[name], name, steps=steps, stages=stages) for name in names]
    if rates := [(record["step"], record["lr"]) for record in records if record.get("lr") is not None]:
        charts.append(line_chart(rates, "learning rate", measure="rate", steps=steps, stages=stages, thin=True))
    return charts


def _stages_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the stages of a run, each with its last step."""
    return {record["stage"]: record["step"] for record in records if "stage" in record}


def _on_the_way(folder: Path) -> str:
    """Show the samples that were drawn while the model trained, of at most six steps, the last one among them."""
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name[5:]))
    every = -(-len(steps) // _N_STEPS_SHOWN) or 1
    shown = []
    for path in steps[::-1][::every][::-1]:
        told = html.escape(path.name.replace("-", " "))
        if preview := _preview(path, told):
            shown.append(f"<h4>{told}</h4>{preview}")
    if not shown:
        return ""
    note = '<p class="note">The same prompts and noise each time.</p>'
    return f"<h3>What the model made on the way</h3>{note}{''.join(shown)}"


def _stages(stages: Mapping[str, Any]) -> str:
    rows = [
        (html.escape(name), _duration(stage["seconds"]), f"{stage['peak_mib']:,.0f} MiB")
        for name, stage in stages.items()
    ]
    return f"<h2>Time and memory</h2>{table(('stage', 'time', 'memory so far, at most'), rows)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
