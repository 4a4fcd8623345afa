"""The report is one well-formed page that needs nothing else and says what metrics.json says."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.report import cells_as_text, line_chart, round_ticks, write_report

VOID = {"meta", "img", "br"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
CELL = {
    "accuracy": 0.5,
    "n": 4,
    "ci95": [0.15, 0.85],
    "chance": 0.1,
    "ceiling": 0.8,
    "copy_rate": 0.25,
    "copy_rate_held_out": 0.125,
    "macro_accuracy": 0.5,
    "per_class": {"3": {"accuracy": 1.0, "n": 2}, "7": {"accuracy": 0.0, "n": 2}},
}
METRICS = {
    "suite": "any-to-any",
    "split": "test",
    "seed": 0,
    "cells": {"text->image": CELL, "image->text": {**CELL, "copy_rate": None, "copy_rate_held_out": None}},
}
SAMPLES = {
    "text->image": [
        {"prompt": {"text": "a <b>three</b> & co"}, "reply": {"image": PIXEL}, "digit": 3, "judged": 3},
        {"prompt": {"text": "seven"}, "reply": {"image": PIXEL}, "digit": 7, "judged": 1},
        {"prompt": {"text": "another three"}, "reply": {"image": PIXEL}, "digit": 3, "judged": 3},
        {"prompt": {"text": "the third three"}, "reply": {"image": PIXEL}, "digit": 3, "judged": 5},
        {"prompt": {"text": "the fourth three"}, "reply": {"image": PIXEL}, "digit": 3, "judged": 3},
    ],
    "image->text": [{"prompt": {"image": PIXEL}, "reply": {"text": ""}, "digit": 3, "judged": None}],
}
finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))


class Balanced(HTMLParser):
    """Fails on a tag that closes another one; notes what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action"}]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take `<line/>`, which opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> str:
    stages = {"data": {"seconds": 61.2, "peak_mib": 512.0}, "model": {"seconds": 10.0, "peak_mib": 2048.0}}
    records: dict[str, Any] = {"metrics": METRICS, "samples": SAMPLES, "stages": stages}
    for name, content in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "run").mkdir()
    log = [{"step": step, "loss/text": 3.0 / step, "loss/image": None if step == 2 else 4.0} for step in (1, 2, 3)]
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return write_report(tmp_path, ["make demo"]).read_text()


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert all(reference.startswith("data:") for reference in parser.references)
    assert not re.search(r"https?://|url\(|@import|<script", page)


def test_page_says_what_the_metrics_say(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    for shown in ("50.0%", "15.0% - 85.0%", "10.0%", "80.0%", "62.5%", "25.0% (12.5%)", "1 min 11 s", "2.0 GiB"):
        assert shown in parser.text
    assert "a <b>three</b> & co" in parser.text  # escaped, not markup
    assert parser.text.count("wrong: judged 1") == 1
    assert "no digit named" in parser.text


def test_samples_beyond_two_of_a_digit_are_folded_away_and_none_is_lost(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    assert parser.text.count("the third three") == 1
    head, folded = page.split("<details>")
    assert "the third three" not in head
    assert "The other 2 of the first 5, 1 of them wrong" in folded


def test_text_table_has_one_aligned_line_per_cell() -> None:
    lines = cells_as_text(METRICS).splitlines()
    assert [line.split()[0] for line in lines] == ["cell", "text->image", "image->text"]
    assert len({len(line) for line in lines}) == 1


@given(st.lists(st.tuples(st.integers(0, 10_000), finite), min_size=1, max_size=30))
def test_curve_stays_inside_its_chart(points: list[tuple[float, float]]) -> None:
    svg = ET.fromstring(line_chart(points, "run: <text> & more"))
    width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
    path = svg.find("path")
    assert path is not None
    placed = [tuple(map(float, pair.split(","))) for pair in path.attrib["d"][1:].split()]
    assert len(placed) == len(points)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in placed)


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside_their_range(low: float, length: float) -> None:
    ticks = round_ticks(low, low + length)
    assert 2 <= len(ticks) <= 6
    slack = 1e-6 * (abs(low) + length)
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)


def test_documents_and_stages_are_shown_with_their_figures(tmp_path: Path) -> None:
    figure = {"accuracy": 0.25, "n": 4, "ci95": [0.05, 0.7], "chance": 0.1, "ceiling": 0.9}
    free = {"right": {**figure, "chance": None, "ceiling": None}}
    metrics = {**METRICS, "documents": {"counting": {"named": figure, "drawn": figure}, "free": free}}
    prompt, reply = [{"text": "<three>"}, {"image": PIXEL}], [{"text": "next is four"}, {"image": PIXEL}]
    entries = [
        {"kind": "counting", "prompt": prompt, "reply": reply, "judged": [4, 4], "right": right} for right in (1, 0)
    ]
    for name, content in (("metrics", metrics), ("samples", SAMPLES), ("stages", {}), ("documents", entries)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    stages = {"data": {"seconds": 1.0, "peak_mib": 1.0}}
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    log = [{"step": 2, "stage": "a", "loss/text": 2.0}, {"step": 4, "stage": "b", "loss/text": 1.0}]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    page = Balanced()
    html = write_report(tmp_path, []).read_text()
    page.feed(html)
    assert not page.open
    assert "Stages of run: a to step 2, b to step 4." in page.text
    assert "&lt;three&gt;" in html
    for expected in ("counting: named", "free: right", "counting: right", "counting: wrong", "5.0% - 70.0%"):
        assert expected in page.text
    lines = cells_as_text(metrics).splitlines()
    assert lines[-2:] == ["documents, counting: named 25.0%, drawn 25.0% of 4", "documents, free: right 25.0% of 4"]
