"""A comparison's folder, or a single run's, as cells and one long table: a row for each score of each cell.

A label is one method at one size, trained on each task with each seed. A cell that is damaged is named and left out;
the others are reported. A single run is a comparison of one cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from ptmoe.errors import PtmoeError
from ptmoe.report.published import paper
from ptmoe.runs.folders import CELL_FILE, FAILED_FILE, PLAN_FILE, Run, read_run
from ptmoe.runs.predictions import read_predictions
from ptmoe.runs.records import CellRecord, EvaluationSummary, Failure
from ptmoe.settings import read_yaml
from ptmoe.tasks import GROUPS
from ptmoe.tasks.resampling import Group, bootstrap_interval

ALL, MEAN = "all examples", "mean of domains"  # in the column `of` of the long table, beside the domains


@dataclass(frozen=True)
class Cell:
    """A finished cell: its record, with the groups among `eval_tasks` resolved, and its run."""

    label: str
    method: str
    size: Mapping[str, Any]
    task: str
    eval_tasks: tuple[str, ...]
    seed: int
    trainable_parameters: int
    run: Run

    def marks(self, task: str) -> pd.DataFrame:
        """Each example's score by metric, from 0 to 1, and its `domain`; the index is the example's id.

        Raises:
            PtmoeError: the predictions are missing or damaged.
        """
        predictions = read_predictions(self.run.predictions[task])
        rows = [{**prediction.scores, "domain": prediction.domain} for prediction in predictions]
        return pd.DataFrame(rows, index=[prediction.id for prediction in predictions])


class LeftOut(NamedTuple):
    """A cell that the numbers do without."""

    label: str
    task: str
    seed: int | None
    state: Literal["failed", "damaged", "unfinished", "not started"]
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """
    Attributes:
        folder: where it was read from.
        plan: the mapping in `comparison.yaml`, or a single run's in `config.yaml`.
        cells: those that are finished, at least one, in the order of the plan's methods and tasks, and by seed.
        left_out: all others.
        single: whether it is a single run.
    """

    folder: Path
    plan: dict[str, Any]
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...] = ()
    single: bool = False

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        """That were trained on."""
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def bases(self) -> list[str]:
        return list(dict.fromkeys(str(cell.run.config.get("model", "nano")) for cell in self.cells))

    def of(self, label: str, task: str | None = None) -> list[Cell]:
        """The cells of a label, or only those that were trained on a task, by seed."""
        return [cell for cell in self.cells if cell.label == label and task in (None, cell.task)]

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The long table that every score in a table, a figure and a download comes from: in percent, a row for each
        cell, evaluated task, metric, and domain (`of`), with the 95 % interval over examples where there is one."""
        rows = [
            {
                "label": cell.label,
                "method": cell.method,
                "size": size_text(cell.size),
                "trainable parameters": cell.trainable_parameters,
                "trained on": cell.task,
                "task": task,
                "seed": cell.seed,
                "of": of,
                "metric": metric,
                "ranks": metric == summary.metric,
                "score": score,
                "score low": low,
                "score high": high,
                "examples": examples,
                "steps": cell.run.result.steps,
                "seconds of training": cell.run.result.train_seconds,
            }
            for cell in self.cells
            for task in cell.eval_tasks
            for summary in [cell.run.evaluations[task]]
            for of, examples, scores in _parts(summary)
            for metric, score in scores.items()
            for low, high in [_interval(cell, task, of, metric)]
        ]
        return pd.DataFrame(rows)


def _parts(summary: EvaluationSummary) -> Iterator[tuple[str, int, Mapping[str, float]]]:
    yield ALL, summary.examples, summary.metrics
    yield MEAN, summary.examples, summary.mean_of_domains
    for domain, part in summary.by_domain.items():
        name = f"{domain} (domain)" if domain in (ALL, MEAN) else domain
        yield name, int(part["examples"]), {metric: score for metric, score in part.items() if metric != "examples"}


def _interval(cell: Cell, task: str, of: str, metric: str) -> tuple[float | None, float | None]:
    if of == ALL:
        return cell.run.evaluations[task].interval.get(metric, (None, None))
    if of == MEAN and task in paper()["mean_of_domains"]:  # not in the file, and shown in the main table
        try:
            return bootstrap_interval(score_groups([cell.marks(task)], metric, by_domain=True))
        except PtmoeError:
            pass
    return None, None


def score_groups(
    marks: Sequence[pd.DataFrame], metric: str, *, by_domain: bool, less: Sequence[pd.DataFrame] = ()
) -> list[Group]:
    """Per-example scores in percent, each the mean over seeds, in the groups that a figure is the mean of.

    Args:
        marks: of each seed (`Cell.marks`); the examples that all of them have are used.
        metric: of the scores.
        by_domain: the figure is the plain mean of the domains, not the mean over all examples.
        less: of another method: then the values are the differences on the same examples.

    Raises:
        PtmoeError: there is no such example, or a prediction lacks the metric.
    """
    ids = sorted(set.intersection(*(set(frame.index) for frame in (*marks, *less))))
    if not ids:
        raise PtmoeError("no example was answered by all of them")
    try:
        values, other = (
            np.mean([100 * frame.loc[ids, metric] for frame in of] or [[0.0]], axis=0) for of in (marks, less)
        )
    except KeyError as error:
        raise PtmoeError(f"a line of the predictions has no score {error}") from None
    domains = marks[0].loc[ids, "domain"].to_numpy()
    parts = [(values - other)[domains == name] for name in sorted(set(domains))] if by_domain else [values - other]
    return [Group(1 / len(parts), part) for part in parts]


def size_text(size: Mapping[str, Any]) -> str:
    """`T=40, N=2, R=36`, as the paper writes them; other sizes go by their own names."""
    symbols = {"num_virtual_tokens": "T", "rank": "R", "num_experts": "N"}
    return ", ".join(f"{symbols.get(name, name)}={value}" for name, value in size.items())


def counted_states(left_out: Sequence[LeftOut]) -> str:
    """`2 failed, 1 not started`."""
    states = [cell.state for cell in left_out]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def single_run(folder: str | Path) -> Comparison:
    """A run folder as a comparison of one cell.

    Raises:
        PtmoeError: as `read_run`.
    """
    run = read_run(folder)
    seed = run.environment.seed if run.environment.seed is not None else int(run.config.get("seed", 0))
    task = str(run.config.get("task") or run.config.get("data") or "–")
    method, parameters = run.result.method, run.result.trainable_parameters
    cell = Cell(run.result.name, method, {}, task, tuple(run.evaluations), seed, parameters, run)
    return Comparison(Path(folder), run.config, (cell,), single=True)


def read_comparison(folder: str | Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        PtmoeError: it is not a folder, its plan is damaged, or no cell in it is finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PtmoeError(f"{folder} is not a folder: give the folder of a comparison")
    plan = read_yaml(folder / PLAN_FILE) if (folder / PLAN_FILE).exists() else {}
    cells, left_out = _cells(folder)
    left_out += _failures(folder, cells)
    if not cells:
        first = next((f"; {cell.label} on {cell.task}: {cell.reason}" for cell in left_out if cell.reason), "")
        raise PtmoeError(
            f"{folder} has no finished cell ({counted_states(left_out) or 'no cell at all'}{first}): a finished cell has "
            f"a cells/LABEL/TASK/seed-N/{CELL_FILE}; run `ptmoe compare` to its end"
        )
    place = _order(plan)
    cells.sort(key=lambda cell: (place(cell), cell.seed))
    return Comparison(folder, plan, tuple(cells), (*_last_states(left_out), *_not_started(cells, left_out)))


def _cells(folder: Path) -> tuple[list[Cell], list[LeftOut]]:
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for path in sorted((folder / "cells").glob("*/*/seed-*"), key=lambda path: _natural(path.as_posix())):
        label, task, seed = (part.replace("__", "/") for part in path.parts[-3:])
        number = seed.removeprefix("seed-")
        named = (label, task, int(number) if number.isdecimal() else None)
        if not (path / CELL_FILE).is_file():
            left_out.append(LeftOut(*named, "unfinished"))
            continue
        try:
            cell = _cell(path)
            _check_against(cell, cells)
        except PtmoeError as error:
            left_out.append(LeftOut(*named, "damaged", str(error)))
        else:
            cells.append(cell)
    return cells, left_out


def _cell(path: Path) -> Cell:
    record, run = CellRecord.read(path / CELL_FILE), read_run(path)
    tasks = [
        member
        for name in record.eval_tasks
        for member in ([name] if name in run.evaluations else GROUPS.get(name, [name]))
    ]
    if not tasks:
        raise PtmoeError(f"{path / CELL_FILE}: eval_tasks is empty")
    if absent := [task for task in tasks if task not in run.evaluations]:
        raise PtmoeError(f"{path / 'eval'} lacks {', '.join(absent)}")
    for name in ("method", "trainable_parameters"):
        if getattr(run.result, name) != getattr(record, name):
            raise PtmoeError(
                f"{path}: {CELL_FILE} has {name}={getattr(record, name)}, result.json {getattr(run.result, name)}"
            )
    return Cell(**{**dict(record), "eval_tasks": tuple(dict.fromkeys(tasks)), "run": run})


def _check_against(cell: Cell, cells: Sequence[Cell]) -> None:
    """A label is one method at one size, and a cell of it is there once."""
    for other in cells:
        if other.label != cell.label:
            continue
        for name in ("method", "size", "trainable_parameters"):
            if getattr(other, name) != getattr(cell, name):
                raise PtmoeError(
                    f"{cell.run.folder}: {name}={getattr(cell, name)}, but {getattr(other, name)} in "
                    f"{other.run.folder}, which has the same label"
                )
        if (other.task, other.seed) == (cell.task, cell.seed):
            raise PtmoeError(f"{cell.run.folder} repeats {other.run.folder}")


def _failures(folder: Path, cells: Sequence[Cell]) -> list[LeftOut]:
    """What failed and was not finished since."""
    try:
        failures = Failure.read_lines(folder / FAILED_FILE) if (folder / FAILED_FILE).exists() else []
    except PtmoeError as error:
        return [LeftOut("–", "–", None, "damaged", str(error))]
    finished = {(cell.label, cell.task, cell.seed) for cell in cells}
    return [LeftOut(*failure.cell, "failed", failure.error) for failure in failures if failure.cell not in finished]


def _last_states(left_out: Sequence[LeftOut]) -> list[LeftOut]:
    """One entry for each cell: its last failure, rather than that it is unfinished."""
    kept: dict[tuple[Any, ...], LeftOut] = {}
    for cell in left_out:
        if cell[:3] not in kept or kept[cell[:3]].state in ("unfinished", "failed"):
            kept[cell[:3]] = cell
    return list(kept.values())


def _not_started(cells: Sequence[Cell], left_out: Sequence[LeftOut]) -> Iterator[LeftOut]:
    """What is missing from the grid of all labels, tasks and seeds that anything is known of."""
    known = {(cell.label, cell.task, cell.seed) for cell in cells}
    known |= {(cell.label, cell.task, cell.seed) for cell in left_out if cell.seed is not None}
    trained = {cell.label for cell in cells if cell.trainable_parameters} | {cell.label for cell in left_out}
    labels, tasks, seeds = (sorted({key[part] for key in known}, key=str) for part in range(3))
    for label, task, seed in product(labels, tasks, seeds):
        # What trains nothing is the same for every seed and every task.
        if label in trained and (label, task, seed) not in known:
            yield LeftOut(str(label), str(task), int(seed), "not started")


def _order(plan: Mapping[str, Any]) -> Any:
    """Sorts cells by where the plan lists the label or the method, otherwise by the methods' own order; then by task."""
    from ptmoe.methods import METHODS

    labels, tasks = _names(plan, "labels", "methods"), _names(plan, "tasks", "task")
    ranks = {name: getattr(config, "order", rank) for rank, (name, config) in enumerate(METHODS.items())}

    def key(cell: Cell) -> tuple[Any, ...]:
        listed = next((labels.index(name) for name in (cell.label, cell.method) if name in labels), len(labels))
        task = tasks.index(cell.task) if cell.task in tasks else len(tasks)
        return listed, ranks.get(cell.method, -1), _natural(cell.label), task, _natural(cell.task)

    return key


def _names(plan: Mapping[str, Any], *keys: str) -> list[str]:
    """The names under a plan's keys: a list of names or of mappings with a label or name, or a single name."""
    values = [value if isinstance(value, list | dict) else [value] for key in keys if (value := plan.get(key))]
    entries = [entry for value in values for entry in value]
    return [str(entry.get("label", entry.get("name"))) if isinstance(entry, dict) else str(entry) for entry in entries]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts "N=2" before "N=10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
