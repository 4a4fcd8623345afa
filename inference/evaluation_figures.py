"""The figures of one cell: how often replies are right, beside chance, the judge's ceiling, and two controls."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from omniform.inference.evaluation_items import Concepts
from omniform.inference.judges import MOTIONS, NO_ANSWER, wilson_interval

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
    copied_source: Bool[np.ndarray, "N"] | None,
    unseen: Bool[np.ndarray, "N"],
) -> dict[str, Any]:
    """Return the figures of a cell that follow from what judges say.

    Args:
        expected: what the sources say, and the targets can say.
        judged: what the judge finds in the replies.
        real: what a judge finds in the real items that the ceiling is measured on.
        copied_source: which replies only repeat their source, which is wrong whatever they say; None where source and
            target are of different modalities.
        unseen: which items have a digit and a motion that training never shows together.
    """
    right, possible = expected.agree(judged), expected.agree(real)
    if copied_source is not None:
        right = right & ~copied_source
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
        "copy_rate_held_out": None,
        "copy_of_source_rate": None if copied_source is None else float(copied_source.mean()),
        "macro_accuracy": float(np.mean([entry["accuracy"] for entry in per_class.values()])),
        "per_class": per_class,
        "digit": figure(
            judged.digits == expected.digits, CHANCE["digit"], float((real.digits == expected.digits).mean())
        ),
        "motion": motion,
        "held_out_pairs": pairs,
    }


def shuffled(expected: Concepts, judged: Concepts) -> dict[str, Any]:
    """Return how often replies are right by the labels of other items: the mean over all pairs of an item and another
    one, so that no draw of a permutation has a say. Near chance, unless labels or answers are few."""
    n = len(expected)
    pairs = n * (n - 1)
    own = expected.agree(judged).sum()
    n_right = n * n * _cross_accuracy(expected, judged) - own
    return {"accuracy": float(n_right / pairs) if pairs else None, "n": n}


def by_noise(expected: Concepts, judged: Concepts) -> dict[str, Any]:
    """Return how often the judge's answers to noise are right, each answer by the labels of all items."""
    return {"accuracy": float(_cross_accuracy(expected, judged)), "n": len(judged)}


def _cross_accuracy(expected: Concepts, judged: Concepts) -> float:
    """Return the mean agreement over all pairs of an answer and a label."""
    return float((_shares(expected) * _shares(judged)).sum())


def _shares(concepts: Concepts) -> Float[np.ndarray, "D M"]:
    """Return the share of each digit and motion; what has no answer has a share of neither."""
    motions = np.zeros(len(concepts), dtype=np.int64) if concepts.motions is None else concepts.motions
    counts = np.zeros((N_DIGITS, len(MOTIONS)))
    told = (concepts.digits != NO_ANSWER) & (motions != NO_ANSWER)
    np.add.at(counts, (concepts.digits[told], motions[told]), 1)
    return counts / len(concepts)
