"""A judge's word on the same items before and after a round trip: in all, by class, and by group, such as voices."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omniform.inference.judges import NO_ANSWER, wilson_interval
from omniform.kernels.keyed_noise import keyed_uniform, stream

JUDGE = "judge"  # the name of the figures of the judge of digits
N_CONFUSIONS = 8
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Answers:
    """What a judge says of items, and what is right: classes from 0, or NO_ANSWER.

    Attributes:
        names: of the classes; their numbers unless given.
    """

    before: npt.NDArray[np.int64]
    after: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]
    names: Sequence[str] | None = None

    def name(self, answer: int) -> str:
        """Return what a class is called."""
        if answer == NO_ANSWER:
            return "none"
        return str(answer) if self.names is None else self.names[answer]


@dataclass(frozen=True)
class _Part:
    """The items of one class or group, as a mask."""

    answers: Answers
    of: npt.NDArray[np.bool_] = field(repr=False)

    def accuracy(self, said: npt.NDArray[np.int64]) -> float:
        return float((said[self.of] == self.answers.right[self.of]).mean())

    def figures(self) -> dict[str, Any]:
        return {
            "accuracy_before": self.accuracy(self.answers.before),
            "accuracy_after": self.accuracy(self.answers.after),
            "n": int(self.of.sum()),
        }


def judged_figures(
    answers: Answers, groups: Mapping[str, Sequence[Any]] | None = None, sources: Sequence[Any] | None = None
) -> dict[str, Any]:
    """Return accuracies, their ratio, 95% intervals of the three, and where the judge errs after the round trip.

    Items of one source, such as a voice, are alike, so what is drawn anew for an interval are whole sources. Where each
    item has a source of its own, accuracies have Wilson intervals.

    Args:
        groups: what sets items apart, such as {"voice": the voice of each item}.
        sources: where each item comes from; None: each from elsewhere.

    Returns:
        {"n", "n_sources", "accuracy_before", "ci95_before", "accuracy_after", "ci95_after", "ratio", "ci95_ratio",
        "per_class", "by_GROUP", "confusions"}: the ratio is after over before, 0 where nothing is right before;
        confusions are the N_CONFUSIONS most frequent pairs of a class and another answer.
    """
    n = len(answers.right)
    whole = _Part(answers, np.ones(n, dtype=bool)).figures()
    source_of = np.unique(np.arange(n) if sources is None else np.array(list(map(str, sources))), return_inverse=True)[
        1
    ]
    intervals = _bootstrap_intervals(answers, source_of)
    n_sources = int(source_of.max()) + 1
    if n_sources == n:
        for side, said in (("before", answers.before), ("after", answers.after)):
            intervals[f"ci95_{side}"] = list(wilson_interval(int((said == answers.right).sum()), n))
    wrong = Counter(
        (right, after)
        for right, after in zip(answers.right.tolist(), answers.after.tolist(), strict=True)
        if right != after
    )
    figures = {
        **whole,
        "n_sources": n_sources,
        **intervals,
        "ratio": whole["accuracy_after"] / whole["accuracy_before"] if whole["accuracy_before"] else 0.0,
        "per_class": {
            answers.name(right): _Part(answers, answers.right == right).figures()
            for right in np.unique(answers.right).tolist()
        },
    }
    for group, values in (groups or {}).items():
        of_items = np.array([str(value) for value in values])
        figures[f"by_{group}"] = {
            value: _Part(answers, of_items == value).figures() for value in sorted(set(of_items.tolist()))
        }
    figures["confusions"] = [
        {"right": answers.name(right), "judged": answers.name(after), "n": count}
        for (right, after), count in sorted(wrong.items(), key=lambda entry: (-entry[1], entry[0]))[:N_CONFUSIONS]
    ]
    return figures


def _bootstrap_intervals(answers: Answers, source_of: npt.NDArray[np.int64]) -> dict[str, list[float]]:
    """Return percentile intervals over N_RESAMPLES draws of as many sources as there are, each with all of its items.

    Both accuracies of a draw are of the same sources, so that the interval of their ratio is that of paired trials. The
    draws are keyed: the same for any two tokenizers on the same items.

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, section 13.3; whole sources as in Davison and
    Hinkley (1997), Bootstrap Methods and their Application, section 3.8.
    """
    right = [said == answers.right for said in (answers.before, answers.after)]
    counts = np.stack(
        [np.bincount(source_of, weights=of) for of in (np.ones(len(source_of)), *right)], axis=1
    )  # (S, 3)
    places, key = np.arange(len(counts)), stream("bootstrap of judged items")
    drawn = (
        counts[(keyed_uniform(key, draw, places) * len(counts)).astype(np.int64)].sum(0) for draw in range(N_RESAMPLES)
    )
    n, before, after = np.stack(list(drawn), axis=1)
    ratio = np.divide(after, before, out=np.zeros_like(after), where=before > 0)
    return {
        f"ci95_{name}": np.quantile(values, [0.025, 0.975]).tolist()
        for name, values in (("before", before / n), ("after", after / n), ("ratio", ratio))
    }
