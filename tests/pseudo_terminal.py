"""A program in a terminal: a pseudo-terminal of the kernel, and a screen that shows what a person would see."""

import os
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte

# Makes the terminal the controlling one, so that Ctrl-C reaches the program as a signal.
_IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_=>])")


class _AnsweringScreen(pyte.Screen):
    """Answers a program that asks where the cursor is, as terminals do."""

    def __init__(self, columns: int, lines: int, master: int) -> None:
        super().__init__(columns, lines)
        self._master = master

    def write_process_input(self, data: str) -> None:
        os.write(self._master, data.encode())


class PseudoTerminal:
    """Runs `python -m MODULE ARGUMENTS` in a terminal of its own.

    Attributes:
        output: everything that the program has written, escape sequences included.
        screen: what is seen now; see pyte.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        cwd: Path,
        environ: Mapping[str, str],
        *,
        columns: int = 100,
        lines: int = 60,
    ) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (lines, columns))
        self.screen: Any = _AnsweringScreen(columns, lines, self._master)
        self._stream = pyte.ByteStream(self.screen)
        self.output, self._matched = b"", 0
        program = [sys.executable, "-c", _IN_TERMINAL, sys.executable, "-m", *arguments]
        keys = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "LANG": "C.UTF-8", "NO_COLOR": ""}
        self._process = subprocess.Popen(
            program,
            cwd=cwd,
            env={**os.environ, **keys, **environ},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        self.attributes = termios.tcgetattr(slave)
        self._slave = slave

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._slave)
        os.close(self._master)

    def type(self, keys: str) -> None:
        """Press keys; "\r" is Enter, "\x03" Ctrl-C, "\x04" Ctrl-D."""
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read until what came after the last match, without escape sequences, matches too; "." is any character."""
        deadline = time.monotonic() + seconds
        while True:
            text = _ESCAPES.sub("", self.output.decode(errors="replace"))
            if match := re.compile(pattern, re.DOTALL).search(text, self._matched):
                self._matched = match.end()
                return match
            assert self._process.poll() is None, f"ended without {pattern!r}: {text[self._matched :]}"
            assert time.monotonic() < deadline, f"no {pattern!r} in {text[self._matched :]!r}"
            self._read()

    def wait_for_end(self, seconds: float = 60) -> int:
        """Wait until the program ends and return its status."""
        deadline = time.monotonic() + seconds
        while (status := self._process.poll()) is None:
            assert time.monotonic() < deadline, f"still running: {self.output[-500:]!r}"
            self._read()
        self._read()
        return status

    def _read(self) -> None:
        """Take what the program has written, until it pauses: keys that come while it draws can get lost. A program
        that writes on and on is not waited for."""
        end = time.monotonic() + 0.5
        while select.select([self._master], [], [], 0.05)[0] and time.monotonic() < end:
            written = os.read(self._master, 2**16)
            self.output += written
            self._stream.feed(written)

    def current_attributes(self) -> list[Any]:
        """Return how the terminal is set: echo, line editing, signals."""
        return termios.tcgetattr(self._slave)
