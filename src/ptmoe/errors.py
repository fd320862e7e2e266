"""The one exception a user meets: it names the value, what is needed and what to do."""

import difflib
import errno
from collections.abc import Iterable

_FREE_SPACE = "make room, then give the same command again (train with --resume)"
_ELSEWHERE = "name another folder, or change what may be written there"
REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: _FREE_SPACE,
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the disk is damaged or gone",
}
# How the message of a `DivergedError` begins, in whichever process it was raised.
DIVERGED = ("the loss became", "the weights became")


class PtmoeError(ValueError):
    """Bad input: a setting, a file, an adapter or data that cannot be used.

    Attributes:
        status: that the command exits with.
    """

    status = 2


def system_error(error: OSError) -> PtmoeError:
    """What the system refused, as the error that users meet: the file, the reason, and what to do."""
    if error.errno is None or error.strerror is None:
        return PtmoeError(str(error))
    place = "" if error.filename is None else f"{error.filename}: "
    remedy = f" ({REMEDIES[error.errno]})" if error.errno in REMEDIES else ""
    return PtmoeError(f"{place}{error.strerror}{remedy}")


def without_embedding(token: int, rows: int) -> str:
    """That a base with `rows` embeddings does not have this token's."""
    return (
        f"token {token} has no embedding, of which the base has {rows:,}: leave it out, or where it was added to the "
        "tokenizer, save the base after base.resize_token_embeddings(len(tokenizer))"
    )


def near(word: str, known: Iterable[str], *, most: int = 1, otherwise: str | None = None) -> str:
    """`"; did you mean 'x', 'y'?"` for the nearest known words, else `otherwise`, by default `"; known: a, b, c"`.

    Args:
        word: what was written.
        known: what could have been.
        most: how many words are named.
        otherwise: where none is near, and there are too many to list.
    """
    known = list(known)
    close = difflib.get_close_matches(word[:100], known, n=most, cutoff=0.6)  # its time grows with the square
    swapped = [name for name in known if sorted(name) == sorted(word)]  # of lroa, lora is no nearer than road there
    if close := list(dict.fromkeys(swapped + close))[:most]:
        return f"; did you mean {', '.join(map(repr, close))}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise


def shown(value: object) -> str:
    """A value as a message shows it: its beginning, where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 300 else f"{text[:300]}…"
