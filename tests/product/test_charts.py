"""Curves stay inside their charts, whatever they are; ticks are few and round."""

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from omniform.charts import line_chart, round_ticks

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4))
curves = st.lists(st.tuples(st.integers(0, 10_000), finite | st.floats(1e-9, 1e6)), min_size=1, max_size=30)
stages = st.dictionaries(st.text(), st.integers(-10, 20_000), max_size=5)


@given(curves, stages, st.booleans())
def test_everything_stays_inside_the_chart(
    points: list[tuple[float, float]], names: dict[str, float], wide: bool
) -> None:
    steps = (0, 10_000) if wide else None
    names = {name: end for name, end in names.items() if name.isprintable()}
    svg = ET.fromstring(line_chart(points, "run: <text> & more", stages=names, steps=steps))
    width, height = (float(v) for v in svg.attrib["viewBox"].split()[2:])
    path = svg.find("path")
    assert path is not None
    placed = [tuple(map(float, pair.split(","))) for pair in path.attrib["d"][1:].split()]
    assert len(placed) == len(points)
    placed += [(float(line.attrib[f"x{k}"]), float(line.attrib[f"y{k}"])) for line in svg.iter("line") for k in "12"]
    placed += [(float(text.attrib["x"]), float(text.attrib["y"])) for text in svg.iter("text") if "x" in text.attrib]
    assert all(0 <= x <= width and 0 <= y <= height for x, y in placed)


def test_axes_are_named_and_a_wide_range_is_logarithmic() -> None:
    charts = [line_chart([(1, 2), (2, top)], "a") for top in (50, 90)]
    said = ["".join(ET.fromstring(chart).itertext()) for chart in charts]
    assert ["logarithmic" in text for text in said] == [False, True]
    assert all("loss" in text and "step" in text and "last" in text for text in said)


def test_lower_values_are_drawn_lower() -> None:
    for top in (5.0, 500.0):
        path = ET.fromstring(line_chart([(0, top), (1, 2.0), (2, 1.0)], "a")).find("path")
        assert path is not None
        heights = [float(pair.split(",")[1]) for pair in path.attrib["d"][1:].split()]
        assert heights == sorted(heights)


@given(finite, st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside_their_range(low: float, length: float) -> None:
    ticks = round_ticks(low, low + length)
    assert 2 <= len(ticks) <= 6
    slack = 1e-6 * (abs(low) + length)
    assert all(low - slack <= tick <= low + length + slack for tick in ticks)
