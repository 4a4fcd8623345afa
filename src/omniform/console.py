"""What the commands of `omniform` share: options, and how they print."""

import json
import unicodedata
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same result.")]


def harmless(text: str) -> str:
    """Return text from data or models without the control characters that could command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def print_json(value: object) -> None:
    """Print a value as JSON on standard output; what JSON does not know as its `str`."""
    print(json.dumps(value, indent=2, default=str))
