"""Runs side by side, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ptmoe.errors import PtmoeError
from ptmoe.report.runs import Run, domains_of, labels, metric_of, tasks_of

MOST_COLUMNS = 5  # of scores, beside the run's own; more are shown as rows


def comparison_table(runs: Sequence[Run], task: str | None = None) -> Table:
    """Each run's trained numbers, score in percent over all examples and by domain, and seconds of training.

    Args:
        runs: at least one.
        task: the task whose domains are shown. By default the only one; where there are several, the table has a
            score for each task instead of each domain.

    Raises:
        PtmoeError: there are no runs, or none was evaluated on `task`.
    """
    if not runs:
        raise PtmoeError("no runs to compare: give finished run folders")
    tasks = tasks_of(runs)
    if task is not None and task not in tasks:
        raise PtmoeError(f"no run was evaluated on {task}; evaluated: {', '.join(tasks) or 'nothing'}")
    single = task or (tasks[0] if len(tasks) == 1 else None)
    scores = score_columns(runs, single) if single else _by_task(runs, tasks)
    cells = {
        "method": [Text(label) for label in labels(runs)],
        "trainable parameters": [Text(f"{run.result.trainable_parameters:,}") for run in runs],
        **{
            name: [Text(percent(value), "bold" if index in best_rows(row) else "") for index, value in enumerate(row)]
            for name, row in scores.items()
        },
        "seconds": [Text(f"{run.result.train_seconds:,.0f}") for run in runs],
    }
    metrics = " or ".join(dict.fromkeys(metric_of(runs, name) for name in ([single] if single else tasks)))
    title = Text(f"{metrics or 'accuracy'} on {single}, %" if single else f"{metrics or 'accuracy'}, %")
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    if len(scores) <= MOST_COLUMNS:
        for name in cells:
            if name == "method":
                table.add_column(name, overflow="fold")
            else:  # numbers are never cut; a long header is, where there is no room
                widest = max(cell.cell_len for cell in cells[name])
                wide = max(widest, len("parameters")) if name == "trainable parameters" else widest
                table.add_column(Text(name), justify="right", overflow="fold", min_width=wide)
        rows = list(zip(*cells.values(), strict=True))
    else:
        table.add_column(Text("method"), overflow="fold")
        for label in cells.pop("method"):
            table.add_column(label, justify="right", overflow="fold")
        rows = [(Text(name), *row) for name, row in cells.items()]
    for row in rows:
        table.add_row(*row)
    return table


def score_columns(runs: Sequence[Run], task: str) -> dict[str, list[float | None]]:
    """Each run's score on a task, in percent: first, under its metric's name, over all examples, then by domain."""
    found = [run.evaluations.get(task) for run in runs]
    columns: dict[str, list[float | None]] = {metric_of(runs, task): [one.score if one else None for one in found]}
    for domain in domains_of(runs, task):
        columns[domain] = [one.domain_score(domain) if one else None for one in found]
    return columns


def best_rows(values: Sequence[float | None]) -> set[int]:
    """Where the highest value stands, as it is printed; nowhere if nothing is lower."""
    printed = {index: round(value, 1) for index, value in enumerate(values) if value is not None}
    best = {index for index, value in printed.items() if value == max(printed.values())}
    return set() if len(best) == len(printed) else best


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return "F1" if metric == "f1" else metric.replace("_", " ")


def percent(value: float | None) -> str:
    """A percentage as it is printed everywhere: one decimal, a dash for none."""
    return "–" if value is None else f"{value:.1f}"


def _by_task(runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, list[float | None]]:
    return {task: [run.evaluations[task].score if task in run.evaluations else None for run in runs] for task in tasks}
