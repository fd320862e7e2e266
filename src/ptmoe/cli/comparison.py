"""`ptmoe compare`, and `ptmoe quickstart`, which is one of its presets."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from ptmoe import nano
from ptmoe.cli.console import Console
from ptmoe.cli.interruption import ends_with_a_signal
from ptmoe.cli.options import given
from ptmoe.errors import PtmoeError, near

if TYPE_CHECKING:
    from ptmoe.compare.cells import Variant
    from ptmoe.compare.plan import ComparePlan
    from ptmoe.compare.run import Comparison
    from ptmoe.runs.searches import RateSearch


def compare(
    context: typer.Context,
    plan: Annotated[
        Path | None,
        typer.Argument(help="YAML file, or the folder of a comparison to continue; options take precedence"),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="also evaluate the untouched base, once; the same as --method base")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what would be run, and at what sizes")] = False,
) -> None:
    """Compare methods × tasks × seeds on equal terms.

    Each method is trained and evaluated with each task and seed, and a report is written. The same command continues a
    comparison that was interrupted or extended.
    """
    from ptmoe.compare.plan import read_plan
    from ptmoe.train.options import BASE

    asked = read_plan(plan, context.obj)
    if with_base:
        asked = asked.replace(methods=[{"name": BASE}, *asked.methods])
    _compare(asked, Console(highlight=False), dry_run=dry_run)


def quickstart(
    output_dir: Annotated[
        Path | None, typer.Option(help="folder of the comparison; by default a new one under runs/")
    ] = None,
    task: Annotated[str, typer.Option(help="a task of nano's world")] = "nano/mixed",
    seed: Annotated[int, typer.Option(help="of the initial prompts, the order of the data and the router's noise")] = 0,
    recipe: Annotated[
        Literal["default", "paper"], typer.Option(help="routing options of PT-MoE: ours, or as published")
    ] = "default",
    steps: Annotated[int | None, typer.Option(help="training steps of each method")] = None,
) -> None:
    """See it learn: tune pt and pt-moe at one parameter budget on nano's mixed world, and compare."""
    from ptmoe.compare.plan import read_plan
    from ptmoe.compare.presets import QUICKSTART
    from ptmoe.tasks import TASKS

    worlds = [name for name in TASKS if name.startswith("nano/") and name != "nano/skills"]
    if task not in worlds:
        raise PtmoeError(f"unknown task {task!r}{near(task, worlds)}")
    folder = output_dir or Path("runs") / f"quickstart-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    changes = {
        "preset": "quickstart",
        "title": f"quickstart: {task}",
        "methods": [
            {**method, "recipe": recipe} if method["name"] == "pt-moe" else method for method in QUICKSTART["methods"]
        ],
        "tasks": [task],
        "seeds": [seed],
        "output_dir": str(folder),
        "jobs": 1,
    }
    plan = read_plan(None, {**changes, **given(max_steps=steps)})
    console = Console(highlight=False)
    console.print(f"nano on {task}: each domain asks for something else, and no instruction says what")
    command = f"ptmoe quickstart --task {task} --seed {seed} --recipe {recipe} --steps {plan.max_steps}"
    _compare(plan, console, show=False, command=command)


def _compare(
    plan: ComparePlan, console: Console, *, dry_run: bool = False, show: bool = True, command: str | None = None
) -> None:
    """Resolve the plan, show it, run what is not finished, and report."""
    from ptmoe.cli.progress import ComparisonBars, progress_bar
    from ptmoe.compare import run
    from ptmoe.models.bases import quiet

    quiet()
    comparison = run.prepare(plan, say=console.print, data=not dry_run)
    folder = comparison.folder.path
    if show:
        _show(comparison, console)
    if dry_run:
        return

    # The report's libraries are optional: a missing one should show before the training, not after.
    from ptmoe.report import comparison_summary, write_report

    with ends_with_a_signal(f"ptmoe compare {folder}", console), progress_bar(console) as progress:
        failed = run.compare(comparison, ComparisonBars(comparison, progress))
    if len(comparison.unfinished) < len(comparison.cells):
        console.print(comparison_summary(folder))
        console.print(f"report: {write_report(folder, command)}")
    for failure in failed:
        line = f"failed: {failure.label} on {failure.task}, seed {failure.seed}: {failure.error}"
        console.print(line)
    if failed:
        console.print(f"{len(failed)} of {len(comparison.cells)} cells failed; the same command retries them")
        raise SystemExit(1)


def _show(comparison: Comparison, console: Console) -> None:
    """The plan: what all methods share, and the size of each."""
    from ptmoe.compare.budget import size_text
    from ptmoe.compare.presets import PRESETS
    from ptmoe.compare.rates import searches, trial_length

    plan = comparison.plan
    if plan.preset is not None and plan.model == nano.NAME != PRESETS[plan.preset][0]["model"]:
        console.print(f"{plan.preset} on nano: in miniature, on nano's own world, since nano reads nothing else")
    length = f"{plan.max_steps:,} steps" if plan.max_steps > 0 else f"{plan.num_train_epochs:g} epochs"
    batch = plan.per_device_train_batch_size * plan.gradient_accumulation_steps
    evaluations = dict.fromkeys(name for cell in comparison.cells for name in cell.eval_tasks)
    examples = f" ({plan.eval_examples:,} examples of each)" if plan.eval_examples else ""
    how = "by the likelihood of each label" if plan.score == "choices" else "greedily"
    console.print(
        f"{plan.model}: trained on {' and on '.join(plan.tasks)}, {length} of {batch} examples, in the same order for "
        f"all methods; evaluated {how} on {', '.join(evaluations)}{examples}",
    )
    table = Table("", "method", "size")
    budgeted = any(variant.budget for variant in comparison.variants)
    for column in ("trainable parameters", *(["of the budget"] if budgeted else []), "learning rate", "finished"):
        table.add_column(column, justify="right")
    unfinished = comparison.unfinished
    searched = [search for search, _ in searches(plan, comparison.cells, comparison.folder.searches())]
    for variant in comparison.variants:
        own = [cell for cell in comparison.cells if cell.variant == variant]
        share = f"{100 * variant.trainable_parameters / variant.budget:.1f} %" if variant.budget else "–"
        table.add_row(
            variant.label,
            variant.config.method,
            size_text(variant.config),
            f"{variant.trainable_parameters:,}",
            *([share] if budgeted else []),
            _rate(variant, [search for search in searched if search.label == variant.label]),
            f"{sum(cell not in unfinished for cell in own)} of {len(own)}",
        )
    console.print(table)
    for left_out in comparison.left_out:
        console.print(f"left out: {left_out}")
    if searched:
        rates, seeds = len(searched[0].rates), len(searched[0].seeds)
        each = trial_length(plan)
        trial = f"{each['max_steps']:,} steps" if "max_steps" in each else f"{each['num_train_epochs']:g} epochs"
        console.print(
            f"search: {rates} learning rates × {seeds} seeds × {len(searched)} (method, size, task), "
            f"{rates * seeds * len(searched)} trials of {trial} scored on validation examples, "
            f"{len(comparison.trials)} to run"
        )
    console.print(
        f"{len(comparison.cells)} cells (seeds {', '.join(map(str, plan.seeds))}), {len(unfinished)} to run, "
        f"{_at_once(comparison)}, in {comparison.folder.path}",
    )


def _rate(variant: Variant, searched: list[RateSearch]) -> str:
    """The learning rate of a method's cells; before the search has chosen, the ends of its grid."""
    chosen = {f"{search.chosen:g}" if search.chosen else "" for search in searched}
    if searched and "" in chosen:
        return f"{searched[0].rates[0]:g} to {searched[0].rates[-1]:g}"
    return ", ".join(chosen) or (f"{variant.learning_rate:g}" if variant.learning_rate else "–")


def _at_once(comparison: Comparison) -> str:
    jobs, on = comparison.plan.jobs, comparison.plan.on
    if on == "processes":
        return f"{comparison.jobs} at once"
    return f"{f'at most {jobs}' if jobs else 'as many as there is room for'} at once on {on}"
