"""JSON as it is written: `json` rounds numbers, and of a key that an object has twice it keeps the last."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from typing_extensions import Self

from ptmoe.tasks.problems import BadRecordError


def twice(names: Iterable[str]) -> list[str]:
    """Those that stand more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A record from its keys and values.

    Raises:
        BadRecordError: it has a key twice.
    """
    if names := twice(key for key, _ in pairs):
        raise BadRecordError(f"has the key {names[0]!r} twice")
    return dict(pairs)


class Written(float):
    """A decimal number of a JSON file, whose text is as it stands there: a float keeps 17 digits at most."""

    def __new__(cls, text: str) -> Self:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Any, ...]:
        return Written, (self.text,)


class Decoder(json.JSONDecoder):
    """Numbers as they are written, and no key twice: Python would keep the last."""

    def __init__(self) -> None:
        super().__init__(parse_float=Written, object_pairs_hook=self._object)
        self.twice: list[str] = []  # of the record that is being read

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.twice += twice(key for key, _ in pairs)
        return made

    def decode(self, text: str, *arguments: Any) -> Any:
        """A text that is one record.

        Raises:
            JSONDecodeError: it is not.
            BadRecordError: as of `checked`.
        """
        self.twice = []
        return self.checked(super().decode(text, *arguments))

    def checked(self, record: Any) -> Any:
        """A record that has been read to its end.

        Raises:
            BadRecordError: it has a key twice.
        """
        keys, self.twice = self.twice, []
        if keys:
            raise BadRecordError(f"has the key {keys[0]!r} twice")
        return record
