"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ptmoe.compare.run import Comparison
from ptmoe.compare.watcher import Watcher
from ptmoe.runs.folders import read_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from ptmoe.compare.cells import Cell
    from ptmoe.train.steps import Progress as Steps

TRAINING_SHARE = 0.9  # of a cell's progress; the rest is its evaluation


def progress_bar(console: Console | None = None) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


def training_bar(progress: Progress, name: str) -> Steps:
    """A callback that shows one training run's steps, remaining time and last loss; its bar appears at the first
    step."""
    bar = progress.add_task(name, start=False, visible=False, note="")

    def show(done: int, steps: int, loss: float | None) -> None:
        progress.start_task(bar)
        note = "" if loss is None else f"loss {loss:.3f}"
        progress.update(bar, completed=done, total=steps, note=note, visible=True)

    return show


class ComparisonBars(Watcher):
    """A bar for all cells with the remaining time, and a bar for each running cell; a line for each finished cell."""

    def __init__(self, comparison: Comparison, progress: Progress) -> None:
        self.folder, self.progress = comparison.folder, progress
        self.done, trials = len(comparison.cells) - len(comparison.unfinished), len(comparison.trials)
        name = "trials, cells" if trials else "cells"
        self.all = progress.add_task(name, total=trials + len(comparison.cells), completed=self.done, note="")
        self.bars: dict[str, TaskID] = {}

    def started(self, cell: Cell) -> None:
        note = "evaluating" if cell.variant.is_base else f"seed {cell.seed}"
        self.bars[cell.name] = self.progress.add_task(cell.variant.label, total=None, note=note)

    def step(self, cell: Cell, done: int, steps: int, loss: float | None) -> None:
        note = f"{cell.task}, seed {cell.seed}" + (f", loss {loss:.3f}" if loss is not None else "")
        note = "evaluating" if done == steps else note
        self.progress.update(self.bars[cell.name], completed=done, total=steps, note=note)
        self._advance()

    def message(self, cell: Cell, text: str) -> None:
        self.progress.console.print(f"{cell.name}: {text}", markup=False)

    def note(self, text: str) -> None:
        self.progress.console.print(text, markup=False)

    def ended(self, cell: Cell, outcome: int | str) -> None:
        bar = self.bars.pop(cell.name)
        seconds = next(task.elapsed or 0.0 for task in self.progress.tasks if task.id == bar)
        text = f"failed: {outcome}"
        if isinstance(outcome, int):
            summaries = read_run(self.folder.run_folder(cell)).evaluations.values()
            scores = ", ".join(f"{summary.task} {summary.score:.1f} %" for summary in summaries)
            text = f"{scores} ({seconds:.0f} s)"
        self.done += 1
        self.progress.remove_task(bar)
        self.message(cell, text)
        self._advance()

    def _advance(self) -> None:
        running = sum(task.percentage for task in self.progress.tasks if task.id != self.all) / 100
        self.progress.update(self.all, completed=self.done + TRAINING_SHARE * running)
