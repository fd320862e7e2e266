"""What is heard of cells while they run, and when they end."""

from collections.abc import Generator
from typing import TypeAlias

from ptmoe.compare.cells import Cell

Outcomes: TypeAlias = Generator[tuple[Cell, int | str], None, None]


class Watcher:
    """Called with what happens, cell by cell, and does nothing with it. Calls may come from several threads."""

    def started(self, cell: Cell) -> None: ...

    def step(self, cell: Cell, done: int, steps: int, loss: float | None) -> None: ...

    def message(self, cell: Cell, text: str) -> None: ...

    def note(self, text: str) -> None:
        """Something that concerns several cells."""

    def ended(self, cell: Cell, outcome: int | str) -> None:
        """With its number of trainable parameters, or what went wrong."""
