"""What the commands of `omniform` share: options, and how they print."""

import json
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same result.")]


def print_json(value: object) -> None:
    """Print a value as JSON on standard output; what JSON does not know as its `str`."""
    print(json.dumps(value, indent=2, default=str))
