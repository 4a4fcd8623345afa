"""What could not be used, counted by reason, with the first few names of each: so that a loss is never silent."""

from collections.abc import Iterator
from typing import Any

N_NAMES = 5


class Tally:
    """Counts names by reason and keeps the first N_NAMES of each."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        count, first = self._entries.get(reason, (0, []))
        self._entries[reason] = (count + 1, first if len(first) == N_NAMES else [*first, name])

    def __len__(self) -> int:
        """Return the number of all that was counted."""
        return sum(count for count, _ in self._entries.values())

    def lines(self) -> Iterator[str]:
        """Yield "count x reason: names" in the order of counts."""
        for reason, (count, first) in sorted(self._entries.items(), key=lambda entry: -entry[1][0]):
            yield f"{count} x {reason}: {', '.join(first)}{', ...' if count > len(first) else ''}"

    def __str__(self) -> str:
        return "; ".join(self.lines())

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return {reason: {"count", "first"}}."""
        return {reason: {"count": count, "first": first} for reason, (count, first) in self._entries.items()}
