"""Cells as text and as colours."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniform.cell_report import anchor, cell_colours, cells_as_text, contrast, modalities_of

CELL: dict[str, Any] = {
    "accuracy": 0.5,
    "n": 4,
    "ci95": [0.15, 0.85],
    "chance": 0.1,
    "ceiling": 0.8,
    "of_ceiling": 0.625,
    "copy_rate": 0.25,
    "copy_rate_train": 1.0,
    "copy_rate_held_out": 0.125,
    "per_class": {},
}
NAMES = ("text", "image", "speech", "video")


def metrics(*cells: str) -> dict[str, Any]:
    return {"split": "validation", "cells": dict.fromkeys(cells, CELL)}


def test_text_has_a_matrix_and_a_line_per_cell() -> None:
    cells = [f"{source}->{target}" for source in NAMES for target in NAMES]
    lines = cells_as_text(metrics(*cells)).splitlines()
    assert lines[0] == "accuracy on validation (of ceiling), from rows to columns"
    assert lines[1].split() == list(NAMES)
    assert [line.split() for line in lines[2:6]] == [[name, *["50.0%", "(62%)"] * 4] for name in NAMES]
    assert lines[6].startswith("of ceiling: mean 62.5% of 16 cells, lowest ")
    assert [line.split()[0] for line in lines[8:]] == ["cell", *cells]
    assert " ".join(lines[9].split()) == "text->text 50.0% 15.0% - 85.0% 4 10.0% 80.0% 62.5% 25.0% (12.5%; 100.0%)"


def test_text_of_few_cells_has_a_matrix_of_their_modalities() -> None:
    missing = [{"cell": f"{name}->text", "reason": f"the model has no {name}"} for name in ("speech", "video")]
    found = metrics("text->image", "image->text", "text->text") | {"missing": missing}
    lines = cells_as_text(found).splitlines()
    assert lines[1].split() == ["text", "image"]
    assert lines[3].split() == ["image", "50.0%", "(62%)", "not", "scored"]
    assert lines[5] == "not scored, the model has no speech: speech->text"
    assert len(lines) == 12


def test_text_tells_motion_pairs_second_judges_and_documents_where_there_are_any() -> None:
    found = metrics("text->video", "text->speech")
    own = {"accuracy": 0.7, "n": 9, "ceiling": 0.9}
    found["cells"]["text->video"] = {**CELL, "digit": own, "motion": own, "held_out_pairs": own}
    unknown = {"accuracy": None, "n": 0, "ci95": None, "ceiling": None, "of_ceiling": None}
    found["cells"]["text->speech"] = {**CELL, **unknown, "second_judge": {**own, "name": "x"}}
    found["documents"] = {"counting": {"named": own, "drawn": own}}
    lines = cells_as_text(found).splitlines()
    assert [" ".join(line.split()) for line in lines[-7:-1]] == [
        "text->speech - - 0 10.0% - - 25.0% (12.5%; 100.0%)",
        "",
        "accuracy of ceiling (number of items), of each thing that a cell is to say:",
        "cell digit motion held-out pairs second judge",
        "text->video 70.0% of 90.0% (9) 70.0% of 90.0% (9) 70.0% of 90.0% (9) -",
        "text->speech - - - 70.0% of 90.0% (9)",
    ]
    assert lines[-1] == "documents, counting: named 70.0%, drawn 70.0% of 9"


def test_modalities_keep_their_order_and_others_come_last() -> None:
    cells = metrics("video->locations", "text->video", "image->text")
    assert modalities_of(cells) == ["text", "image", "video", "locations"]


@given(st.floats(-1, 3))
def test_figures_can_be_read_on_every_colour(fraction: float) -> None:
    assert contrast(*cell_colours(fraction)) >= 4.5  # WCAG 2, level AA


@given(st.floats(0, 1), st.floats(0, 1))
def test_more_of_the_ceiling_is_never_darker(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert contrast("#000000", cell_colours(low)[0]) <= contrast("#000000", cell_colours(high)[0]) + 0.1


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # just short of AA, as is well known


def test_anchors_tell_cells_apart() -> None:
    assert len({anchor(f"{source}->{target}") for source in NAMES for target in NAMES}) == 16
