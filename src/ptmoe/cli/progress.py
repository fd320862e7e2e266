"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from ptmoe.train.steps import Progress as Steps


def progress_bar(console: Console | None = None) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def training_bar(progress: Progress, name: str) -> Steps:
    """A callback that shows one training run's steps, remaining time and last loss; its bar appears at the first
    step."""
    bar: TaskID | None = None

    def show(done: int, steps: int, loss: float | None) -> None:
        nonlocal bar
        if bar is None:
            bar = progress.add_task(name, note="")
        progress.update(bar, completed=done, total=steps, note="" if loss is None else f"loss {loss:.3f}")

    return show
