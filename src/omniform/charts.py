"""Curves as inline SVG: one per chart, with labelled axes and the stages of a run marked."""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 44, 36
_CHARACTER = 6.0  # about the width of a letter
_LOG_FROM = 30.0  # the ratio of the largest to the smallest value from which a linear axis would hide the small ones


def line_chart(
    points: Sequence[tuple[float, float]],
    title: str,
    *,
    measure: str = "loss",
    steps: tuple[float, float] | None = None,
    stages: Mapping[str, float] | None = None,
    thin: bool = False,
) -> str:
    """Return an inline SVG of one curve through (step, value) points.

    The value axis is logarithmic where all values are positive and the largest is at least 30 times the smallest.

    Args:
        measure: what the values are, written along their axis.
        steps: first and last step of the axis, so that charts can be compared; those of the curve unless given.
        stages: name of each stage and its last step, in order: a dashed line where one stage gives way to the next,
            and the names that fit.
        thin: draw the curve thinner.
    """
    values = [value for _, value in points]
    logarithmic = min(values) > 0 and max(values) >= _LOG_FROM * min(values)
    level = math.log10 if logarithmic else float
    first, last = _span(steps or [step for step, _ in points])
    low, high = _span(level(value) for value in values)
    ticks = _log_ticks(min(values), max(values)) if logarithmic else round_ticks(low, high)

    def across(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        return _TOP + (high - level(value)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    rules = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    said = f"{measure}, logarithmic" if logarithmic else measure
    axes = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 20}">{first:g}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 20}" text-anchor="end">{last:g}</text>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{html.escape(said)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="18" text-anchor="end">last {points[-1][1]:.3g}</text>'
    )
    path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
    label = html.escape(title)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}: {html.escape(said)} by step, from '
        f'{points[0][1]:.3g} to {points[-1][1]:.3g}"><text class="title" x="12" y="18">{label}</text>{rules}'
        f"{_boundaries(stages or {}, first, last, across)}"
        f'<path class="{"thin" if thin else "curve"}" d="M{path}"/>{axes}</svg>'
    )


def _boundaries(stages: Mapping[str, float], first: float, last: float, across: Callable[[float], float]) -> str:
    """Return the name of each stage above the steps that it took, where it has the room, and a line at its end."""
    parts, start = [], first
    for name, end in stages.items():
        if start < end < last:
            parts.append(
                f'<line class="stage" x1="{across(end):.1f}" x2="{across(end):.1f}" y1="{_TOP - 12}" '
                f'y2="{_HEIGHT - _BOTTOM}"/>'
            )
        if start <= end <= last:
            middle = (across(start) + across(end)) / 2
            if len(name) * _CHARACTER <= across(end) - across(start):
                parts.append(f'<text x="{middle:.1f}" y="{_TOP - 4}" text-anchor="middle">{html.escape(name)}</text>')
            start = end
    return "".join(parts)


def round_ticks(low: float, high: float) -> list[float]:
    """Return two to six round values that lie in [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most six powers of ten that lie in [low, high], evenly apart; at least one where high >= 10 low."""
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**power for power in powers[:: math.ceil(len(powers) / 6)]]


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Return the smallest and largest value, kept apart so that an axis has a length."""
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
