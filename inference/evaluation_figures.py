"""The figures of one cell: how often replies are right, beside chance, the judge's ceiling, and two controls."""

from typing import Any

import numpy as np
from jaxtyping import Bool

from omniform.inference.evaluation_items import Concepts
from omniform.inference.judges import MOTIONS, wilson_interval

N_DIGITS = 10
CHANCE = {"digit": 1 / N_DIGITS, "motion": 1 / len(MOTIONS), "both": 1 / (N_DIGITS * len(MOTIONS))}


def figure(right: Bool[np.ndarray, "N"], chance: float | None, ceiling: float | None) -> dict[str, Any]:
    """Return {"accuracy", "n", "ci95", "chance", "ceiling"}, None where there are no items."""
    n, n_right = len(right), int(right.sum())
    return {
        "accuracy": n_right / n if n else None,
        "n": n,
        "ci95": list(wilson_interval(n_right, n)) if n else None,
        "chance": chance,
        "ceiling": ceiling,
    }


def cell_figures(
    expected: Concepts,
    judged: Concepts,
    real: Concepts,
    unseen: Bool[np.ndarray, "N"],
    also: Bool[np.ndarray, "N"],
    also_real: Bool[np.ndarray, "N"],
) -> dict[str, Any]:
    """Return the figures of a cell that follow from what judges say.

    Args:
        expected: what the sources say, and the targets can say.
        judged: what the judge finds in the replies.
        real: what a judge finds in the real items that the ceiling is measured on.
        unseen: which items have a digit and a motion that training never shows together.
        also: which replies are all else that they must be to be right; `also_real`: which real items are.
    """
    right, possible = expected.agree(judged) & also, expected.agree(real) & also_real
    ceiling = float(possible.mean())
    cell = figure(right, CHANCE["digit" if expected.motions is None else "both"], ceiling)
    per_class = {
        str(digit): {"accuracy": float(right[of].mean()), "n": int(of.sum())}
        for digit in np.unique(expected.digits)
        if (of := expected.digits == digit).any()
    }
    motion, pairs = None, None
    if expected.motions is not None and judged.motions is not None and real.motions is not None:
        could = float((real.motions == expected.motions).mean())
        motion = figure(judged.motions == expected.motions, CHANCE["motion"], could)
        pairs = figure(right[unseen], CHANCE["both"], float(possible[unseen].mean()) if unseen.any() else None)
    return {
        **cell,
        "of_ceiling": cell["accuracy"] / ceiling if ceiling else None,
        "copy_rate": None,
        "copy_rate_train": None,
        "copy_rate_held_out": None,
        "copy_of_source_rate": None,
        "macro_accuracy": float(np.mean([entry["accuracy"] for entry in per_class.values()])),
        "per_class": per_class,
        "digit": figure(
            judged.digits == expected.digits, CHANCE["digit"], float((real.digits == expected.digits).mean())
        ),
        "motion": motion,
        "held_out_pairs": pairs,
    }


def shuffled(right: Bool[np.ndarray, "N N"]) -> dict[str, Any]:
    """Return how often replies are right by the labels of other items: the mean over all pairs of an item and another
    one, so that no draw of a permutation has a say. Near chance, unless labels or answers are few.

    Args:
        right: whether the reply of a row is right by the label of a column.
    """
    n = len(right)
    pairs = n * (n - 1)
    return {"accuracy": float((right.sum() - right.trace()) / pairs) if pairs else None, "n": n}


def by_noise(expected: Concepts, judged: Concepts) -> dict[str, Any]:
    """Return how often the judge's answers to noise are right, each answer by the labels of all items."""
    return {"accuracy": float(crossed(judged, expected).mean()), "n": len(judged)}


def crossed(judged: Concepts, expected: Concepts) -> Bool[np.ndarray, "N M"]:
    """Return whether each answer agrees with each label."""
    same = judged.digits[:, None] == expected.digits
    return (
        same
        if expected.motions is None or judged.motions is None
        else same & (judged.motions[:, None] == expected.motions)
    )
