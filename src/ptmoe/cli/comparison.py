"""`ptmoe compare`, and `ptmoe quickstart`, which is one of its presets."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ptmoe import nano
from ptmoe.cli.progress import progress_bar
from ptmoe.compare.budget import sizes_of
from ptmoe.compare.plan import ComparePlan, read_plan
from ptmoe.compare.presets import PRESETS
from ptmoe.compare.run import Comparison, Watcher, compare, prepare
from ptmoe.errors import PtmoeError, near
from ptmoe.runs.folders import read_run
from ptmoe.tasks import TASKS
from ptmoe.train.options import BASE

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ptmoe.compare.cells import Cell

TRAINING_SHARE = 0.9  # of a cell's progress; the rest is its evaluation


def run(path: Path | None, chosen: dict[str, Any], *, with_base: bool, dry_run: bool) -> None:
    """Work the plan out, show it, run what is not finished, and report."""
    plan = read_plan(path, chosen)
    if with_base:
        plan = plan.replace(methods=[{"name": BASE}, *plan.methods])
    _compare(plan, Console(highlight=False), dry_run=dry_run)


def quickstart(output_dir: Path | None, *, task: str, seed: int, recipe: str, steps: int | None = None) -> Path:
    """The preset `quickstart` on a task of nano's world, with one seed; returns the comparison's folder.

    Raises:
        PtmoeError: a task that is not of nano's world, or a folder of another comparison.
    """
    worlds = [name for name in TASKS if name.startswith("nano/") and name != "nano/skills"]
    if task not in worlds:
        raise PtmoeError(f"unknown task {task!r}{near(task, worlds)}")
    folder = output_dir or Path("runs") / f"quickstart-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    methods = [
        {**method, **({"recipe": recipe} if method["name"] == "pt-moe" else {})}
        for method in PRESETS["quickstart"][1]["methods"]
    ]
    changes = {"methods": methods, "tasks": [task], "seeds": [seed], "output_dir": str(folder), "jobs": 1}
    length = {} if steps is None else {"max_steps": steps}
    plan = read_plan(None, {"preset": "quickstart", "title": f"quickstart: {task}", **changes, **length})
    console = Console(highlight=False)
    console.print(f"nano on {task}: each domain asks for something else, and no instruction says what")
    command = f"ptmoe quickstart --task {task} --seed {seed} --recipe {recipe} --steps {plan.max_steps}"
    _compare(plan, console, show=False, command=command)
    return folder


def _compare(
    plan: ComparePlan, console: Console, *, dry_run: bool = False, show: bool = True, command: str | None = None
) -> None:
    from ptmoe.models.bases import quiet

    quiet()
    comparison = prepare(plan, say=console.print, data=not dry_run)
    if show:
        _show(comparison, console)
    if dry_run:
        return

    # The report's libraries are optional: a missing one should show before the training, not after.
    from ptmoe.report import comparison_summary, write_report

    try:
        with progress_bar() as progress:
            failed = compare(comparison, _Bars(comparison, progress))
    except KeyboardInterrupt:
        console.print(f"stopped; continue with: ptmoe compare {comparison.folder.path}")
        raise SystemExit(130) from None
    if len(comparison.unfinished) < len(comparison.cells):
        console.print(comparison_summary(comparison.folder.path))
        console.print(f"report: {write_report(comparison.folder.path, command)}", markup=False)
    for failure in failed:
        line = f"failed: {failure.label} on {failure.task}, seed {failure.seed}: {failure.error}"
        console.print(line, markup=False)
    if failed:
        console.print(f"{len(failed)} of {len(comparison.cells)} cells failed; the same command retries them")
        raise SystemExit(1)


def _show(comparison: Comparison, console: Console) -> None:
    """The plan: what all methods share, and the size of each."""
    plan = comparison.plan
    if plan.preset is not None and plan.model == nano.NAME != PRESETS[plan.preset][0]["model"]:
        console.print(f"{plan.preset} on nano: in miniature, on nano's own world, since nano reads nothing else")
    length = f"{plan.max_steps:,} steps" if plan.max_steps > 0 else f"{plan.num_train_epochs:g} epochs"
    batch = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    evaluations = dict.fromkeys(name for cell in comparison.cells for name in cell.eval_tasks)
    examples = f" ({plan.eval_examples:,} examples of each)" if plan.eval_examples else ""
    console.print(
        f"{plan.model}: trained on {' and on '.join(plan.tasks)}, {length} of {batch} examples, in the same order for "
        f"all methods; evaluated greedily on {', '.join(evaluations)}{examples}",
        markup=False,
    )
    table = Table("", "method", "size")
    budgeted = any(variant.budget for variant in comparison.variants)
    for column in ("trainable parameters", *(["of the budget"] if budgeted else []), "learning rate", "finished"):
        table.add_column(column, justify="right")
    unfinished = comparison.unfinished
    for variant in comparison.variants:
        own = [cell for cell in comparison.cells if cell.variant == variant]
        share = f"{100 * variant.trainable_parameters / variant.budget:.1f} %" if variant.budget else "–"
        table.add_row(
            variant.label,
            variant.config.method,
            ", ".join(f"{name}={value}" for name, value in sizes_of(variant.config).items()) or "–",
            f"{variant.trainable_parameters:,}",
            *([share] if budgeted else []),
            f"{variant.learning_rate:g}" if variant.learning_rate else "–",
            f"{sum(cell not in unfinished for cell in own)} of {len(own)}",
        )
    console.print(table)
    for left_out in comparison.left_out:
        console.print(f"left out: {left_out}", markup=False)
    console.print(
        f"{len(comparison.cells)} cells (seeds {', '.join(map(str, plan.seeds))}), {len(unfinished)} to run, "
        f"{comparison.jobs} at once, in {comparison.folder.path}",
        markup=False,
    )


class _Bars(Watcher):
    """A bar for all cells with the remaining time, and a bar for each running cell; a line for each finished cell."""

    def __init__(self, comparison: Comparison, progress: Progress) -> None:
        self.comparison = comparison
        self.progress = progress
        self.done = len(comparison.cells) - len(comparison.unfinished)
        self.all = progress.add_task("cells", total=len(comparison.cells), completed=self.done, note="")
        self.bars: dict[str, TaskID] = {}
        self.shares: dict[str, float] = {}  # of the running cells that are done
        self.since: dict[str, float] = {}

    def started(self, cell: Cell) -> None:
        self.since[cell.name] = time.monotonic()
        self.bars[cell.name] = self.progress.add_task(
            cell.variant.label, total=None, note="evaluating" if cell.variant.is_base else f"seed {cell.seed}"
        )

    def step(self, cell: Cell, done: int, steps: int, loss: float | None) -> None:
        note = f"{cell.task}, seed {cell.seed}" + (f", loss {loss:.3f}" if loss is not None else "")
        self.progress.update(
            self.bars[cell.name], completed=done, total=steps, note="evaluating" if done == steps else note
        )
        self.shares[cell.name] = TRAINING_SHARE * done / steps
        self._advance()

    def said(self, cell: Cell, line: str) -> None:
        self.progress.console.print(f"{cell.name}: {line}", markup=False)

    def finished(self, cell: Cell) -> None:
        summaries = read_run(self.comparison.folder.run_folder(cell)).evaluations.values()
        shown = ", ".join(f"{summary.task} {summary.score:.1f} %" for summary in summaries)
        self._end(cell, f"{shown} ({time.monotonic() - self.since[cell.name]:.0f} s)")

    def failed(self, cell: Cell, error: str) -> None:
        self._end(cell, f"failed: {error}")

    def _end(self, cell: Cell, line: str) -> None:
        self.done += 1
        self.shares.pop(cell.name, None)
        self.progress.remove_task(self.bars.pop(cell.name))
        self.said(cell, line)
        self._advance()

    def _advance(self) -> None:
        self.progress.update(self.all, completed=self.done + sum(list(self.shares.values())))
