"""Where the lines of a chat come from: typed, with editing, history and completion, or read as they are."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from omniform.errors import OmniformError
from omniform.inference.chat_commands import COMMANDS


def plain_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a stream that no one types into, without their ends."""
    for line in stream:
        yield line.rstrip("\r\n")


def typed_lines(
    message: Callable[[], str], completer: Completer, history: Path | None, note: Callable[[str], None]
) -> Iterator[str]:
    """Yield what is typed, until Ctrl-D or Ctrl-C twice on an empty line.

    Enter sends a line, Alt-Enter starts another one within it, Ctrl-C empties it.

    Args:
        message: says what stands before each line.
        history: file that keeps what was typed, readable by its owner alone; None keeps it in memory only.
        note: told what is to be told.
    """
    session: PromptSession[str] = PromptSession(
        history=_history(history),
        completer=completer,
        complete_while_typing=False,
        key_bindings=_bindings(),
        # Standard output may be a file for the replies: then standard error is the terminal.
        output=None if sys.stdout.isatty() else create_output(always_prefer_tty=True),
    )
    warned = False
    while True:
        try:
            line = session.prompt(message)
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            note("Ctrl-C once more, Ctrl-D or /quit leaves.")
        except EOFError:
            return
        else:
            warned = False
            yield line


class ChatCompleter(Completer):
    """Completes commands, their arguments, and the files after an at sign.

    Args:
        names: what `/to` takes.
        settings: what `/set` takes.
    """

    def __init__(self, names: Iterable[str], settings: Iterable[str]) -> None:
        self._words = {
            "to": list(names),
            "set": [f"{name}=" for name in settings],
            "keep": ["on", "off"],
        }
        # A name with a space would need quotes around it, which a completion cannot add.
        self._paths = PathCompleter(expanduser=True, file_filter=lambda name: " " not in name)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what can stand in the place of the word before the cursor."""
        before = document.text_before_cursor
        word = before.replace(",", " ").rpartition(" ")[2]
        command, space, _ = before.removeprefix("/").partition(" ")
        if before.startswith("/") and not space:
            yield from _starting_with(command, COMMANDS)
        elif before.startswith("/") and command in self._words:
            yield from _starting_with(word, self._words[command])
        elif before.startswith("/") and command in ("attach", "save"):
            yield from self._paths.get_completions(Document(word), complete_event)
        elif word.startswith("@") and not word.startswith("@@"):
            yield from self._paths.get_completions(Document(word[1:]), complete_event)


def _starting_with(start: str, words: Iterable[str]) -> Iterator[Completion]:
    for word in words:
        if word.startswith(start):
            yield Completion(word, start_position=-len(start))


def make_private(history: Path) -> None:
    """Make the file of what is typed if need be, and let its owner alone read it.

    Raises:
        OmniformError: it cannot be made or changed, or is no plain file.
    """
    try:
        if history.exists() and not history.is_file():
            raise OmniformError(f"--history {history} is no plain file: name a file, or leave it out to keep nothing")
        descriptor = os.open(history, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OmniformError(
            f"--history {history}: cannot be written: {error.strerror}; name a file of your own in a folder that is "
            "there"
        ) from error


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    make_private(path)
    return FileHistory(path)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    @bindings.add("<sigint>")
    def empty_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    @bindings.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
