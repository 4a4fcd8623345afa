"""Text that a terminal shows and does not obey."""

import unicodedata


def harmless(text: str) -> str:
    """Return text from data or models without the control characters that could command the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
