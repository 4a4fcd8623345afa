"""Two ways of doing the same work, timed in turns in one process and compared as ratios.

The order is ABBA: a drift of the machine's speed falls on both alike. Pairs in which a thread had to wait for the
processor (wall time above 1.05 of its processor time) are dropped and counted. The result is the median of the ratios
of the pairs with a bootstrap interval; the same measurement of the first way against itself must give 1 within 2 %.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WARM_UP_PAIRS = 2
CONTENDED = 1.05
Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How many times as long `slow` takes as `fast`.

    Attributes:
        ratio: median over pairs; `low` and `high` bound it at 95 %.
        seconds: median of (fast, slow).
        n_pairs, n_dropped: pairs used, and pairs dropped because the processor was shared.
    """

    ratio: float
    low: float
    high: float
    seconds: tuple[float, float]
    n_pairs: int
    n_dropped: int

    def __str__(self) -> str:
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        times = " and ".join(f"{1000 * seconds:.1f} ms" for seconds in self.seconds)
        return f"{self.ratio:.2f} {interval}, {times}, {self.n_pairs} pairs, {self.n_dropped} dropped"


def compare(fast: Work, slow: Work, n_pairs: int = 21) -> Ratio:
    """Time both in turns; all pairs count if fewer than half of them ran undisturbed."""
    pairs = [_pair(fast, slow, turned=bool(number % 2)) for number in range(WARM_UP_PAIRS + n_pairs)][WARM_UP_PAIRS:]
    calm = [(a, b) for a, b, disturbed in pairs if not disturbed]
    used = calm if len(calm) * 2 >= n_pairs else [(a, b) for a, b, _ in pairs]
    ratios = np.array([b / a for a, b in used])
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    middle = (statistics.median(a for a, _ in used), statistics.median(b for _, b in used))
    return Ratio(float(np.median(ratios)), float(low), float(high), middle, len(used), n_pairs - len(used))


def control(work: Work, n_pairs: int = 21) -> tuple[Ratio, str]:
    """Compare work with itself, and say whether the machine was calm enough for the other ratios to mean something."""
    ratio = compare(work, work, n_pairs)
    verdict = "valid" if abs(ratio.ratio - 1) <= 0.02 else "VOID: the machine was too busy, run it again"
    return ratio, verdict


def _pair(first: Work, second: Work, *, turned: bool) -> tuple[float, float, bool]:
    timed = [_time(work) for work in ((second, first) if turned else (first, second))]
    (a, a_disturbed), (b, b_disturbed) = reversed(timed) if turned else timed
    return a, b, a_disturbed or b_disturbed


def _time(work: Work) -> tuple[float, bool]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return wall, wall > CONTENDED * processor
