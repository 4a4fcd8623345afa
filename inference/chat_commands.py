"""What can be typed in a chat: prompts with files in them, and commands, which start with a slash."""

import difflib
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from omniform.errors import OmniformError
from omniform.inference.protocol import split_names


@dataclass(frozen=True)
class Command:
    """One command as `/help` shows it."""

    usage: str
    meaning: str


COMMANDS = {
    "to": Command("/to NAME,...", "what to answer with, in order, such as /to text,image; any: the model chooses"),
    "attach": Command("/attach FILE ...", "put files before the next prompt; @FILE puts one inside a prompt"),
    "set": Command("/set NAME=VALUE ...", "change how replies are sampled; NAME= goes back to the model's own value"),
    "settings": Command("/settings", "show what is set"),
    "seed": Command("/seed [N]", "give every reply the seed N; without N each has a new one"),
    "again": Command("/again", "answer the last prompt again, with a new seed unless one is fixed"),
    "keep": Command("/keep on|off", "whether the model reads the earlier turns too (off at first)"),
    "clear": Command("/clear", "forget the earlier turns and the files that wait; written files stay"),
    "save": Command("/save FILE", "write the turns as lines of JSON, with the paths of their files"),
    "help": Command("/help", "show this list"),
    "quit": Command("/quit", "leave; so do Ctrl-D, and Ctrl-C twice"),
}
_ALIASES = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit"}
_FILE = re.compile(r"""(?:^|(?<=\s))@(?!@)("[^"]*"|'[^']*'|\S*)""")
_ESCAPED = re.compile(r"(?:^|(?<=\s))@@")


def parse_command(line: str) -> tuple[str, str] | None:
    """Return the name and the arguments of a command, None for a prompt.

    Raises:
        OmniformError: a command that does not exist.
    """
    if not line.startswith("/") or line.startswith("//"):
        return None
    name, _, arguments = line[1:].partition(" ")
    name = _ALIASES.get(name, name)
    if name not in COMMANDS:
        hint = "/help lists the commands; write // for text that starts with a slash"
        if Path(line.strip("'\" ")).is_file():
            hint = "that is a file: write @ before it, or /attach"
        elif near := difflib.get_close_matches(name, COMMANDS, n=1):
            hint = f"did you mean /{near[0]}? {hint}"
        raise OmniformError(f"unknown command /{name}: {hint}")
    return name, arguments.strip()


def split_prompt(line: str) -> list[str | Path]:
    """Return the texts and files of a prompt, in order.

    A word that starts with an at sign names a file, in quotes if its name has spaces; with two it is text that starts
    with one. A line that starts with two slashes is text that starts with one.
    """
    line = line[1:] if line.startswith("//") else line
    parts: list[str | Path] = []
    for place, piece in enumerate(_FILE.split(line)):
        if place % 2:
            name = piece[1:-1] if piece[:1] in ("'", '"') and piece[-1:] == piece[:1] and len(piece) > 1 else piece
            parts.append(to_path(name, "@"))
        elif text := piece.strip():
            parts.append(_ESCAPED.sub("@", text))
    return parts


def split_words(arguments: str) -> list[str]:
    """Return the words of a command's arguments; quotes hold together what has spaces.

    Raises:
        OmniformError: a quote without its other half.
    """
    try:
        return shlex.split(arguments)
    except ValueError as error:
        raise OmniformError(
            f"cannot read {arguments!r}: a quote has no other half; put \\ before a single one"
        ) from error


def to_path(name: str, before: str) -> Path:
    """Return the path that a user names, ~ being the home folder.

    Raises:
        OmniformError: no name; `before` is what stood before it.
    """
    if not name:
        raise OmniformError(f"no file is named after {before.strip()}: write {before}FILE")
    return Path(name).expanduser()


def parse_names(given: str, modalities: Iterable[str], anything: str) -> list[str]:
    """Return the modalities of a list such as "text,image".

    Args:
        anything: the name that stands, alone, for the model's own choice.

    Raises:
        OmniformError: no name, or one that the model has not.
    """
    known = [*modalities, anything]
    names = split_names(given)
    for name in names:
        if name not in known:
            raise OmniformError(f"this model cannot answer with {name!r}, expected some of {', '.join(known)}")
    if not names:
        raise OmniformError(f"no modality is named: expected some of {', '.join(known)}, such as /to {known[0]}")
    if anything in names and len(names) > 1:
        raise OmniformError(f"{given!r} names {anything} and others: with {anything} the model chooses every part")
    return names


def parse_assignments(given: str, known: Iterable[str]) -> dict[str, int | float | str | None]:
    """Return the values of NAME=VALUE words: numbers where they are numbers, None where there is no value.

    Raises:
        OmniformError: a word of another form, or a name that is not `known`.
    """
    found: dict[str, int | float | str | None] = {}
    words = split_words(given)
    if not words:
        raise OmniformError("nothing to set: write /set NAME=VALUE, such as /set temperature=0.5")
    for word in words:
        name, equals, value = word.partition("=")
        if name not in (names := list(known)):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise OmniformError(f"unknown setting {name!r}: {hint}expected one of {', '.join(names)}")
        if not equals:
            raise OmniformError(f"{name} has no value: write /set {name}=VALUE, or /set {name}= for the model's own")
        found[name] = _value(value) if name != "negative_prompt" else value or None
    return found


def parse_switch(given: str) -> bool:
    """Return whether "on" is given and not "off".

    Raises:
        OmniformError: neither.
    """
    if given not in ("on", "off"):
        raise OmniformError(f"/keep is given {given!r}, expected on or off")
    return given == "on"


def parse_seed(given: str) -> int | None:
    """Return a seed, None where none is given.

    Raises:
        OmniformError: no integer in [0, 2**63).
    """
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", given) or int(given) >= 2**63:
        raise OmniformError(
            f"/seed is given {given!r}, expected an integer in [0, 2**63), or nothing for a new one each"
        )
    return int(given)


def _value(text: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
