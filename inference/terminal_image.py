"""Pictures in a terminal: each cell shows two pixels, the upper as the colour of a half block, the lower behind it."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from omniform.tokenizers.image_files import plain_picture

Colors = Literal["true", "256"]

_HALF_BLOCK = "▀"
_RESET = "\x1b[0m"
_CUBE = (0, 95, 135, 175, 215, 255)
# Entries 16 to 255 of the palette that xterm introduced: a cube of colours, then greys. The 16 below are the user's.
_PALETTE = np.array(
    [(r, g, b) for r in _CUBE for g in _CUBE for b in _CUBE] + [(8 + 10 * step,) * 3 for step in range(24)], np.int64
)


def color_support(environ: Mapping[str, str], encoding: str) -> Colors | None:
    """Return which colours a terminal shows by what its environment says, None where it can show no picture.

    Args:
        environ: NO_COLOR (no-color.org), COLORTERM and TERM are read.
        encoding: of what is written to the terminal; one without half blocks shows no picture.
    """
    if environ.get("NO_COLOR") or environ.get("TERM", "dumb") in ("", "dumb", "linux"):
        return None
    try:
        _HALF_BLOCK.encode(encoding)
    except UnicodeEncodeError:
        return None
    return "true" if environ.get("COLORTERM") in ("truecolor", "24bit") else "256"


def half_blocks(image: Image.Image, columns: int, rows: int, colors: Colors = "true") -> list[str]:
    """Return the lines that show a picture, of at most `rows` lines of at most `columns` cells.

    A picture that fits is magnified by the largest whole number with which it still does; a larger one is reduced,
    each pixel the mean of the area that it covers. Transparent parts are laid on white.

    Args:
        colors: "true" for 24 bits per pixel, "256" for the nearest colour of the usual palette.
    """
    pixels = fit_to_cells(image, columns, rows)
    codes = _true_codes(pixels) if colors == "true" else _palette_codes(pixels)
    lines = []
    for top in range(0, len(codes), 2):
        line, before = "", ("", "")
        for column, upper in enumerate(codes[top]):
            lower = codes[top + 1][column] if top + 1 < len(codes) else ""
            cell = (f"38;{upper}", f"48;{lower}" if lower else "49")
            changed = [new for new, old in zip(cell, before, strict=True) if new != old]
            line += (f"\x1b[{';'.join(changed)}m" if changed else "") + _HALF_BLOCK
            before = cell
        lines.append(line + _RESET)
    return lines


def fit_to_cells(image: Image.Image, columns: int, rows: int) -> UInt8[np.ndarray, "H W 3"]:
    """Return the pixels that `half_blocks` shows: W at most `columns`, H at most 2 `rows`."""
    picture = plain_picture(image, "RGB")
    scale = min(max(columns, 1) / picture.width, 2 * max(rows, 1) / picture.height)
    if scale >= 1:
        levels = np.asarray(picture)
        return levels.repeat(int(scale), axis=0).repeat(int(scale), axis=1)
    size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
    return np.asarray(picture.resize(size, Image.Resampling.BOX))


def _true_codes(pixels: UInt8[np.ndarray, "H W 3"]) -> list[list[str]]:
    return [[f"2;{red};{green};{blue}" for red, green, blue in row] for row in pixels.tolist()]


def _palette_codes(pixels: UInt8[np.ndarray, "H W 3"]) -> list[list[str]]:
    distances = np.square(pixels[:, :, None].astype(np.int64) - _PALETTE).sum(axis=-1)
    return [[f"5;{16 + int(entry)}" for entry in row] for row in distances.argmin(axis=-1)]
