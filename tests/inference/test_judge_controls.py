"""How `omniform bench judges` counts answers."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from omniform.inference.judges import NO_ANSWER

COUNTS = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "judges.py"))


def test_answers_are_counted() -> None:
    answers, right = np.array([1, 2, 2, NO_ANSWER]), np.array([1, 2, 3, 4])
    row = COUNTS["answered"]("speech", "words", answers, right)
    assert (row["n"], row["right"], row["none"]) == (4, 2, 1)
    assert row["frequent"] == [("two", 2), ("one", 1)]
    assert COUNTS["answered"]("speech", "silence", answers)["right"] is None


def test_answers_to_other_items_are_right_by_chance() -> None:
    digits = np.repeat(np.arange(10), 50)
    assert COUNTS["dealt"]("speech", digits, digits, range(10))["right"] / 500 == pytest.approx(0.1, abs=0.01)
