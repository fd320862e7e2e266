"""What makes the cells of a comparison incomparable, or their scores too good or too low."""

from collections.abc import Iterator
from typing import Any

from ptmoe.report.comparison import Comparison

EVALUATED = "Cells were evaluated on different data."
ANSWERED = "Cells were evaluated in different ways."
WAYS = ("score", "dtype", "quantization")  # of an evaluation, where `ptmoe eval` may have repeated a cell's
TRAINED = "Cells were trained on different data."
BASES = "Cells ran on different bases."
VERSIONS = "Cells ran with different versions."
RATES = "Cells of one method were trained at different learning rates."


def incomparable(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Headings, and lines under each."""
    found: dict[tuple[str, str, str], dict[Any, str]] = {}  # by heading, task and label, each value's first cell
    too_long: dict[tuple[str, str], str] = {}
    for cell in comparison.cells:
        name = f"{cell.label} on {cell.task}, seed {cell.seed}"
        environment, result = cell.run.environment, cell.run.result
        read: list[tuple[str, str, Any, int]] = [
            (VERSIONS, "", (environment.commit, *sorted(environment.versions.items())), 0)
        ]
        if environment.base is not None:
            read.append((BASES, "", environment.base, 0))
        if cell.trainable_parameters:
            read.append((TRAINED, cell.task, environment.data, result.examples_cut + result.examples_left_out))
            found.setdefault((RATES, cell.task, cell.label), {}).setdefault(cell.run.config.get("learning_rate"), name)
        for task in cell.eval_tasks:
            one = cell.run.evaluations[task]
            read.append((EVALUATED, task, one.settings.get("data"), one.cut + one.unanswered))
            read.append((ANSWERED, task, tuple(map(one.settings.get, WAYS)), 0))
            if one.cut + one.unanswered:
                counts = f"{one.cut:,} cut and {one.unanswered:,} not answered of {one.examples:,}"
                too_long.setdefault((cell.label, task), f"{cell.label} on {task}: {counts}.")
        for heading, task, value, short in read:
            # Each method has room for inputs of another length: where some are too long, only its own cells are alike.
            for label in (cell.label,) if short else ("", cell.label):
                found.setdefault((heading, task, label), {}).setdefault(value, name)
    for heading in (EVALUATED, ANSWERED, TRAINED, BASES, VERSIONS, RATES):
        unlike: dict[str, str] = {}
        for (of, task, _), names in found.items():
            if of == heading and len(names) > 1:
                unlike.setdefault(task, "; ".join(names.values()))
        if unlike:
            lines = (f"{task}: {names}".removeprefix(": ") for task, names in unlike.items())
            yield heading, [f"The first that differ: {line}." for line in lines]
    if too_long:
        yield "Inputs did not fit: they were cut, or not answered, which scores 0.", list(too_long.values())
    seen = {cell.task: cell.run.result for cell in comparison.cells if cell.run.result.examples_evaluated}
    if seen:
        yield (
            "Training examples are evaluated as well.",
            [f"{task}: {one.examples_evaluated:,} of {one.examples:,}." for task, one in seen.items()],
        )
