"""Bad records, each with its location, which the caller refuses or skips; and the keys of which nothing is made."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ptmoe.errors import PtmoeError

SHOWN = 5  # bad records that a message names; all are counted


class BadRecordError(PtmoeError):
    """What is wrong with a record; the reader adds its location."""


class Problems:
    """The bad records found while reading.

    Args:
        skip: count and list them; otherwise `refuse` raises.
        at_once: raise at the first, for a stream that is used before its end is read.

    Attributes:
        count: of the bad records.
        unread: the keys of good records that reach no model and no grader, with the location of the first of each.
    """

    def __init__(self, *, skip: bool = False, at_once: bool = False) -> None:
        self.skip = skip
        self.at_once = at_once
        self.count = 0
        self.first: list[str] = []
        self.unread: dict[str, str] = {}
        self._all: IO[str] | None = None  # a file, where there are more than `SHOWN`

    def add(self, place: str, what: str) -> None:
        self.count += 1
        line = f"{place}: {what}"
        if self.count <= SHOWN:
            self.first.append(line)
        else:
            if self._all is None:
                self._all = tempfile.NamedTemporaryFile(  # noqa: SIM115  # as long as the reading
                    "w",
                    encoding="utf-8",
                    errors="backslashreplace",
                    prefix="ptmoe-bad-records-",
                    suffix=".txt",
                    delete=False,
                )
                self._all.writelines(f"{first}\n" for first in self.first)
            self._all.write(f"{line}\n")
        if self.at_once:
            self.refuse()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Add a `BadRecordError` raised in this block, with its location."""
        try:
            yield
        except BadRecordError as error:
            self.add(place, str(error))

    def listed(self) -> str:
        """How many there are, and the first of them; where there are more, the file that lists all."""
        more = ""
        if self._all is not None:
            self._all.flush()
            more = f"\n  … and {self.count - len(self.first)} more, all listed in {self._all.name}"
        return f"{self.count} bad record(s):\n  " + "\n  ".join(self.first) + more

    def notes(self) -> Iterator[str]:
        """What a user should know of the records that were read, a sentence each."""
        if self.count:
            yield f"left out {self.listed()}"
        if self.unread:
            keys = ", ".join(f"{key!r} ({place})" for key, place in [*self.unread.items()][:SHOWN])
            more = f" and {len(self.unread) - SHOWN} more" if len(self.unread) > SHOWN else ""
            yield f"not read, and in no example: the keys {keys}{more}"

    def refuse(self) -> None:
        """
        Raises:
            PtmoeError: there are bad records, and they are not skipped.
        """
        if self.count and not self.skip:
            raise PtmoeError(f"{self.listed()}\nfix or remove them, or skip them with --skip-bad")
