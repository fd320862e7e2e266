"""`ptmoe quickstart`: see the method learn, on nano, in under three minutes.

The untouched base, one soft prompt for every input (pt), and a prompt composed for each input (pt-moe, with no more
trained numbers than pt), on a world where each domain needs something else of the same kind of input. The settings
below are what docs/findings.md measured over ten seeds.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks import TASKS
from ptmoe.train.options import BASE, TrainOptions

STEPS = 400
EXAMPLES = 1000
METHODS: dict[str, dict[str, Any]] = {
    "pt": {"num_virtual_tokens": 20},
    "pt-moe": {"num_virtual_tokens": 10, "num_experts": 4, "rank": 10},
}


def options(method: str, *, task: str, seed: int, recipe: str = "default", steps: int = STEPS) -> TrainOptions:
    """How the quickstart trains a method; `benchmarks/seeds.py` trains the same over many seeds."""
    fields = {"name": method, **METHODS[method]}
    if method == "pt-moe":
        fields["recipe"] = recipe
    return TrainOptions(
        task=task,
        method=fields,
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=32,
        eval_examples=EXAMPLES,
        save_steps=steps,
    )


def run(
    output_dir: Path | None, *, task: str, seed: int, recipe: str, steps: int = STEPS, console: Console | None = None
) -> Path:
    """Tune, evaluate, print the table and write the report; returns the folder.

    Raises:
        PtmoeError: a task that is not of nano's world, or a folder that holds something.
    """
    worlds = [name for name in TASKS if name.startswith("nano/") and name != "nano/skills"]
    if task not in worlds:
        raise PtmoeError(f"unknown task {task!r}{near(task, worlds)}")
    folder = output_dir or Path("runs") / f"quickstart-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PtmoeError(f"{folder} already holds a run: choose another --output-dir")
    plans = {method: options(method, task=task, seed=seed, recipe=recipe, steps=steps) for method in METHODS}

    from ptmoe.models.bases import quiet

    quiet()  # some libraries speak while they are imported

    # The report's libraries are optional: a missing one should show before the training, not after.
    from ptmoe.cli.progress import progress_bar, training_bar
    from ptmoe.report import comparison_table, read_run, write_report
    from ptmoe.train.recipe import evaluate_base, train
    from ptmoe.train.steps import StepsCallback

    console = console or Console()
    console.print(f"nano on {task}: each domain asks for something else, and no instruction says what")
    base = options("pt", task=task, seed=seed).replace(output_dir=str(folder / BASE))
    evaluate_base(base, say=console.print)
    with progress_bar() as progress:
        for method, plan in plans.items():
            placed = plan.replace(output_dir=str(folder / method))
            train(placed, callbacks=[StepsCallback(training_bar(progress, method))], say=progress.console.print)
    runs = [read_run(folder / name) for name in (BASE, *METHODS)]
    console.print(comparison_table(runs))
    command = f"ptmoe quickstart --task {task} --seed {seed} --recipe {recipe} --steps {steps}"
    report = write_report(folder, runs, f"quickstart: {task}", command)
    console.print(f"report: {report}")
    return folder
