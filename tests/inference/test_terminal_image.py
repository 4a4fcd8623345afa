"""Pictures in a terminal, read back by a terminal emulator that knows nothing of them (pyte)."""

import numpy as np
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import UInt8
from PIL import Image

from omniform.inference.terminal_image import color_support, fit_to_cells, half_blocks

PIXELS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).map(lambda shape: (*shape, 3)))


def shown(lines: list[str], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels that a terminal shows: two of each cell, less a last row that was left out."""
    screen = pyte.Screen(columns, len(lines) + 1)
    pyte.Stream(screen).feed("\r\n".join(lines))
    width = sum(screen.buffer[0][column].data == "▀" for column in range(columns))
    rows = []
    for line in range(len(lines)):
        cells = [screen.buffer[line][column] for column in range(width)]
        assert all(cell.data == "▀" for cell in cells)
        rows.append([bytes.fromhex(cell.fg) for cell in cells])
        if all(cell.bg != "default" for cell in cells):
            rows.append([bytes.fromhex(cell.bg) for cell in cells])
        else:
            assert line == len(lines) - 1
    after = screen.buffer[len(lines) - 1][width]
    assert (after.data, after.fg, after.bg) == (" ", "default", "default")
    return np.array([[list(pixel) for pixel in row] for row in rows], np.uint8)


@given(PIXELS, st.integers(1, 4))
def test_a_terminal_shows_every_pixel_magnified_by_a_whole_number(pixels: np.ndarray, factor: int) -> None:
    height, width, _ = pixels.shape
    lines = half_blocks(Image.fromarray(pixels), factor * width, height * factor)
    assert len(lines) == (height * factor + 1) // 2
    np.testing.assert_array_equal(shown(lines, 60), np.kron(pixels, np.ones((factor, factor, 1), np.uint8)))


@given(PIXELS, st.integers(2, 5))
def test_a_picture_too_large_is_shown_as_the_mean_of_each_area(pixels: np.ndarray, factor: int) -> None:
    height, width, _ = pixels.shape
    large = np.random.default_rng(height * width).integers(0, 256, (height * factor, width * factor, 3), np.uint8)
    means = large.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    lines = half_blocks(Image.fromarray(large), width, 50)
    assert np.abs(shown(lines, 60) - means).max() <= 1


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 90), st.integers(1, 40))
def test_no_picture_is_larger_than_its_place(width: int, height: int, columns: int, rows: int) -> None:
    pixels = fit_to_cells(Image.new("L", (width, height)), columns, rows)
    assert pixels.shape[1] <= columns
    assert pixels.shape[0] <= 2 * rows


def test_256_colours_are_the_nearest_of_those_that_terminals_have() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    palette = np.array([list(bytes.fromhex(color)) for color in pyte.graphics.FG_BG_256[16:]])
    distances = np.linalg.norm(pixels[:, :, None].astype(float) - palette, axis=-1)
    found = shown(half_blocks(Image.fromarray(pixels), 8, 3, "256"), 60)
    np.testing.assert_allclose(np.linalg.norm(found - pixels.astype(float), axis=-1), distances.min(axis=-1))


def test_transparent_is_white_and_grey_is_grey() -> None:
    clear = Image.new("RGBA", (1, 2), (255, 0, 0, 0))
    assert shown(half_blocks(clear, 1, 1), 60).tolist() == [[[255, 255, 255]], [[255, 255, 255]]]
    assert shown(half_blocks(Image.new("L", (1, 1), 7), 1, 1), 60).tolist() == [[[7, 7, 7]]]


@pytest.mark.parametrize(
    ("environ", "encoding", "expected"),
    [
        ({"TERM": "xterm-256color"}, "utf-8", "256"),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, "utf-8", "true"),
        ({"TERM": "xterm", "COLORTERM": "24bit", "NO_COLOR": ""}, "utf-8", "true"),
        ({"TERM": "xterm", "COLORTERM": "truecolor", "NO_COLOR": "1"}, "utf-8", None),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, "utf-8", None),
        ({"TERM": "linux"}, "utf-8", None),
        ({}, "utf-8", None),
        ({"TERM": "xterm"}, "ascii", None),
        ({"TERM": "xterm"}, "latin-1", None),
    ],
)
def test_what_a_terminal_can_show(environ: dict[str, str], encoding: str, expected: str | None) -> None:
    assert color_support(environ, encoding) == expected
