"""The terminal that a chat is shown in: results on one stream, everything said about them on another."""

import shutil
from collections.abc import Mapping
from typing import TextIO

from PIL import Image

from omniform.inference.terminal_image import color_support, half_blocks
from omniform.inference.terminal_text import harmless

_CLEAR_LINE = "\r\x1b[2K"
_PICTURE_COLUMNS = 32


class Screen:
    """What is printed, and where.

    Args:
        results: for replies: text, pictures and the paths of files.
        notes: for everything else, so that `results` can go to a file alone.
        environ: says which colours the terminal shows; see `color_support`.
    """

    def __init__(self, results: TextIO, notes: TextIO, environ: Mapping[str, str]) -> None:
        self._results, self._notes = results, notes

        self._colors = color_support(environ, results.encoding) if results.isatty() else None
        self._moves = notes.isatty() and environ.get("TERM", "dumb") not in ("", "dumb")
        self._open_line = self._progress = False

    def write(self, text: str) -> None:
        """Print more of a text as it comes."""
        self._clear_progress()
        self._results.write(harmless(text))
        self._results.flush()
        self._open_line = not text.endswith("\n") if text else self._open_line

    def end_line(self) -> None:
        """End the line that a text left open, if it did."""
        if self._open_line:
            self.write("\n")

    def line(self, text: str) -> None:
        """Print one result on a line of its own."""
        self.end_line()
        self.write(f"{text}\n")

    def note(self, text: str) -> None:
        """Say something about the results."""
        self.end_line()
        self._clear_progress()
        self._notes.write(f"{harmless(text)}\n")
        self._notes.flush()

    def progress(self, text: str) -> None:
        """Show how far something is, in a line that the next thing printed replaces; nothing outside a terminal."""
        if self._moves:
            self.end_line()
            self._notes.write(_CLEAR_LINE + harmless(text)[: shutil.get_terminal_size().columns - 1])
            self._notes.flush()
            self._progress = True

    def picture(self, image: Image.Image) -> None:
        """Show a picture, where the terminal can."""
        if self._colors is None:
            return
        self.end_line()
        self._clear_progress()
        size = shutil.get_terminal_size()
        lines = half_blocks(image, min(size.columns, _PICTURE_COLUMNS), max(1, size.lines - 4), self._colors)
        self._results.write("".join(f"{line}\n" for line in lines))
        self._results.flush()

    def _clear_progress(self) -> None:
        if self._progress:
            self._notes.write(_CLEAR_LINE)
            self._notes.flush()
            self._progress = False
