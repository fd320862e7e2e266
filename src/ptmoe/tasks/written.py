"""JSON as it is written: `json` rounds numbers, and of a key that an object has twice it keeps the last."""

import json
from collections import Counter
from typing import Any

from typing_extensions import Self

from ptmoe.tasks.problems import BadRecordError


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
            self.twice += (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
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
        twice, self.twice = self.twice, []
        if twice:
            raise BadRecordError(f"has the key {twice[0]!r} twice")
        return record
