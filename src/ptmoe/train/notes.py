"""What a user should know of the training examples before any training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ptmoe.tasks import Example, Problems
from ptmoe.tasks.base import folded

if TYPE_CHECKING:
    from ptmoe.train.rows import TokenRows


class Overlap:
    """Counts the training examples whose input is evaluated, up to case and white space."""

    def __init__(self, held_out: dict[str, list[Example]]) -> None:
        self.count = 0
        self._evaluated = {folded(example.input) for examples in held_out.values() for example in examples}

    def watched(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples as they are."""
        for example in examples:
            self.count += folded(example.input) in self._evaluated
            yield example


def notes(rows: TokenRows, problems: Problems, overlap: Overlap, length: int, virtual_tokens: int) -> Iterator[str]:
    """What a user should know of the training examples, a sentence each; a row has at most `length` tokens, beside the
    virtual ones."""
    yield from problems.notes()
    if overlap.count:
        yield (
            f"{overlap.count:,} of the training examples are evaluated as well: the scores say less about new examples"
        )
    if rows.cut or rows.left_out:
        yield (
            f"{rows.left_out:,} of {len(rows) + rows.left_out:,} examples left out and {rows.cut:,} cut: longer than "
            f"{length:,} tokens (--max-length, or the base's positions less {virtual_tokens} virtual tokens)"
        )
