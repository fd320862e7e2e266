"""The one exception a user meets: it names the value, what is needed and what to do."""

import difflib
from collections.abc import Iterable


class PtmoeError(ValueError):
    """Bad input: a setting, a file, an adapter or data that cannot be used.

    Attributes:
        status: that the command exits with.
    """

    status = 2


def near(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known word, else `"; known: a, b, c"`."""
    known = list(known)
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.6)  # its time grows with the square
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def shown(value: object) -> str:
    """A value as a message shows it: its beginning, where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 300 else f"{text[:300]}…"
