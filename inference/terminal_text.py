"""Text that a terminal shows and does not obey."""

import unicodedata

_OBEYED = ("Cc", "Cf", "Zl", "Zp")
# Scripts such as Arabic and Devanagari, and composed emoji, are written with the two joiners.
_KEPT = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"


def harmless(text: str) -> str:
    """Return text from data or models with U+FFFD for what could command the terminal, hide or turn around what it
    shows, or break a line where none is meant: controls, formats such as those of direction, and separators."""
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _OBEYED else "\ufffd" for c in text)
