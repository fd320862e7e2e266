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
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
