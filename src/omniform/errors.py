"""The one exception family. A leaf: every room may import it."""

COMPLAINTS_VARIABLE = "OMNIFORM_COMPLAINTS"
"""Environment variable: the folder in which the processes of one launch mark what one of them has complained of."""


class OmniformError(ValueError):
    """Something that the user gave cannot be used.

    The message names what was given, what was expected and what to do. The command line prints it without a
    traceback and exits with status 2; the library lets it pass to the caller.

    Attributes:
        reason: a few words, the same for all errors of a kind, by which such errors are counted.
    """

    reason = "cannot be used"
