"""A judge's word on the same items before and after a round trip: in all, by class, and by group, such as voices."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omniform.inference.judges import NO_ANSWER, wilson_interval

JUDGE = "judge"  # the name of the figures of the judge of digits
N_CONFUSIONS = 8


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


def judged_figures(answers: Answers, groups: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Any]:
    """Return accuracies with their 95% intervals (Wilson), their ratio, and where the judge errs after the round trip.

    Args:
        groups: what sets items apart, such as {"voice": the voice of each item}.

    Returns:
        {"n", "accuracy_before", "ci95_before", "accuracy_after", "ci95_after", "ratio", "per_class", "by_GROUP",
        "confusions"}: confusions are the N_CONFUSIONS most frequent pairs of a class and another answer.
    """
    n = len(answers.right)
    whole = _Part(answers, np.ones(n, dtype=bool)).figures()
    intervals = {
        f"ci95_{side}": list(wilson_interval(int((said == answers.right).sum()), n))
        for side, said in (("before", answers.before), ("after", answers.after))
    }
    wrong = Counter(
        (right, after)
        for right, after in zip(answers.right.tolist(), answers.after.tolist(), strict=True)
        if right != after
    )
    figures = {
        **whole,
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
