"""Shares of the any-to-any suite, each the cells of one target modality, scored in one process or in several."""

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from omniform.data.job_pool import done_in_processes
from omniform.inference.evaluation_cells import CellScorer

# Cells of one target have their judge, and the train items that replies are compared with, in common. Those that take
# longest come first.
_LONGEST = ("speech", "video")

Sampling = Mapping[str, Mapping[str, Any]]


@dataclass
class Scored:
    """What scoring some cells gave.

    Attributes:
        cells: figures by cell.
        samples: the first replies by cell.
        judges, copies: about them, as in metrics.json.
    """

    cells: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    judges: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, Any] = field(default_factory=dict)


def score_here(suite: CellScorer, cells: Sequence[str], sampling: Sampling) -> Scored:
    """Score cells one after the other, once it is known that their judges can be made."""
    targets = dict.fromkeys(cell.partition("->")[2] for cell in cells)
    print(f"fitting the judges for replies in {', '.join(targets)}", file=sys.stderr, flush=True)
    suite.prepare(cells)
    scored = Scored()
    for cell in cells:
        started = time.monotonic()
        scored.cells[cell], scored.samples[cell] = suite.score(cell, sampling.get(cell.partition("->")[2], {}))
        _say(cell, scored.cells[cell], time.monotonic() - started)
    scored.judges, scored.copies = suite.judges.about, dict(sorted(suite.copies_about.items()))
    return scored


def score_in_processes(
    suite: Callable[[], CellScorer], cells: Sequence[str], sampling: Sampling, workers: int
) -> Scored:
    """Score the cells of each target in a process of its own, at most `workers` at the same time, each on one thread.

    Args:
        suite: can be pickled; every process makes its own.

    Raises:
        DataError: what `score_here` would raise, or a process died.
    """
    suite().prepare(cells, only_foreign=True)
    parts: dict[str, Scored] = {}
    with tempfile.TemporaryDirectory(prefix="omniform-") as folder:
        targets = dict.fromkeys(cell.partition("->")[2] for cell in cells)
        names = sorted(targets, key=lambda name: _LONGEST.index(name) if name in _LONGEST else len(_LONGEST))
        jobs = [_Share(name, tuple(c for c in cells if c.endswith(f">{name}")), Path(folder)) for name in names]
        with closing(done_in_processes(jobs, functools.partial(_scorer, suite, sampling), workers)) as done:
            for share in done:
                parts[share.target] = Scored(**json.loads(share.path.read_text(encoding="utf-8")))
    whole = Scored()
    for part in parts.values():
        whole.judges.update(part.judges)
    for cell in cells:
        part = parts[cell.partition("->")[2]]
        whole.cells[cell], whole.samples[cell] = part.cells[cell], part.samples[cell]
        whole.copies.update(part.copies)
    # In an order that does not tell which process did what.
    whole.judges, whole.copies = dict(sorted(whole.judges.items())), dict(sorted(whole.copies.items()))
    return whole


@dataclass(frozen=True)
class _Share:
    target: str
    cells: tuple[str, ...]
    folder: Path

    def __str__(self) -> str:
        return f"cells of {self.target}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.target}.json"


def _scorer(suite: Callable[[], CellScorer], sampling: Sampling) -> Callable[[_Share], None]:
    torch.set_num_threads(1)
    own = suite()

    def score(share: _Share) -> None:
        share.path.write_text(json.dumps(vars(score_here(own, share.cells, sampling))), encoding="utf-8")

    return score


def _say(cell: str, figures: Mapping[str, Any], seconds: float) -> None:
    """Print how a cell went as soon as it is known: the whole suite takes minutes."""
    right = f"{figures['accuracy']:.1%} of {figures['n']} right, ceiling {figures['ceiling']:.1%}"
    print(f"{cell}: {right}, {seconds:.0f} s", file=sys.stderr, flush=True)
