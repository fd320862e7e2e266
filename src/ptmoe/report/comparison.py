"""A comparison's folder, or a single run's, as cells and one long table: a row for each score of each cell.

A label is one method at one size, trained on each task with each seed. A cell that is damaged is named and left out;
the others are reported. A single run is a comparison of one cell.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from ptmoe.errors import PtmoeError
from ptmoe.runs.folders import CELL_FILE, FAILED_FILE, PLAN_FILE, SEARCH_FILE, Run, file_name, read_run
from ptmoe.runs.predictions import read_predictions
from ptmoe.runs.records import CellRecord, Failure, Prediction
from ptmoe.runs.searches import RateSearch
from ptmoe.settings import OF_PEFT, read_yaml
from ptmoe.tasks import GROUPS
from ptmoe.tasks.resampling import Group, bootstrap_interval
from ptmoe.train.options import BASE

ALL, MEAN = "all examples", "mean of domains"  # in the column `of` of the long table, beside the domains
AVERAGE = "average"
COLUMN_NAMES = (ALL, MEAN, AVERAGE, "method", "source", "trainable parameters", "seeds")  # of tables with scores


class Cell(CellRecord):
    """A finished cell: its record, with the groups among `eval_tasks` resolved, and its run."""

    run: Run

    def marks(self, task: str) -> pd.DataFrame:
        """Each example's score by metric, from 0 to 1, its `domain`, and what was `asked`, "" where the prompt did
        not fit as a whole; the index is the example's id.

        Raises:
            PtmoeError: the predictions are missing or damaged.
        """
        predictions = read_predictions(self.run.predictions[task])
        rows = [{**one.scores, "domain": one.domain, "asked": _asked(one)} for one in predictions]
        return pd.DataFrame(rows, index=[prediction.id for prediction in predictions])

    def facts(self) -> dict[str, Any]:
        """What is the same in all its rows of the long table."""
        return {
            "label": self.label,
            "method": self.method,
            "size": size_text(self.size),
            "trainable parameters": self.trainable_parameters,
            "learning rate": self.run.config.get("learning_rate"),
            "steps": self.run.result.steps,
            "seconds of training": self.run.result.train_seconds,
            **self.costs(),
            "trained on": self.task,
            "seed": self.seed,
        }

    def costs(self) -> dict[str, float | None]:
        """What it takes to keep, to train and to use, as far as the run recorded it. The seconds of a step are those
        from the first line of the log to the last, without what comes before the first step."""
        result, logs = self.run.result, [log for log in self.run.logs if log.step and log.seconds is not None]
        steps = (logs[-1].step or 0) - (logs[0].step or 0) if logs else 0
        seconds = (logs[-1].seconds or 0.0) - (logs[0].seconds or 0.0) if logs else 0.0
        lost = result.forgetting
        return {
            "adapter bytes": result.adapter_bytes,
            "seconds a step": seconds / steps if steps > 0 else None,
            "peak memory": result.peak_memory,
            "forgetting": None if lost is None else lost.loss - lost.base_loss,
        }

    def scores(self) -> Iterator[dict[str, Any]]:
        """Its rows of the long table: a score in percent for each evaluated task, part of its examples and metric, with
        the 95 % interval over examples where it is known."""
        for task in self.eval_tasks:
            summary = self.run.evaluations[task]
            parts: list[tuple[str, float, Mapping[str, float]]] = [
                (ALL, summary.examples, summary.metrics),
                (MEAN, summary.examples, summary.mean_of_domains),
                *((distinct_name(domain), part["examples"], part) for domain, part in summary.by_domain.items()),
            ]
            for of, examples, scores in parts:
                for metric in filter(scores.__contains__, summary.metrics):
                    low, high = self._interval(task, of, metric)
                    row = {"task": task, "of": of, "metric": metric, "ranks": metric == summary.metric}
                    row |= {"score": scores[metric], "score low": low, "score high": high, "examples": int(examples)}
                    yield self.facts() | row

    def _interval(self, task: str, of: str, metric: str) -> tuple[float | None, float | None]:
        if of == ALL:
            return self.run.evaluations[task].interval.get(metric, (None, None))
        if of == MEAN and task in paper()["mean_of_domains"]:  # not in the file, and shown in the main table
            try:
                return bootstrap_interval(score_groups(example_scores([self.marks(task)], metric), by_domain=True))
            except PtmoeError:
                pass
        return None, None


class LeftOut(NamedTuple):
    """A cell that the numbers do without."""

    label: str
    task: str
    seed: int | None
    state: Literal["failed", "damaged", "unfinished", "not started"]
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    folder: Path
    plan: dict[str, Any]  # the mapping in `comparison.yaml`, or a single run's in `config.yaml`
    cells: tuple[Cell, ...]  # finished, at least one, in the order of the plan's methods and tasks, and by seed
    left_out: tuple[LeftOut, ...] = ()  # all others
    single: bool = False  # a single run
    searches: tuple[RateSearch, ...] = ()  # for learning rates, where there were any

    @property
    def methods(self) -> dict[str, str]:
        """Each label's."""
        return {cell.label: cell.method for cell in self.cells}

    @property
    def labels(self) -> list[str]:
        return list(self.methods)

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
        """The long table that every score in a table, a figure and a download comes from."""
        return pd.DataFrame([row for cell in self.cells for row in cell.scores()])


@cache
def paper() -> dict[str, Any]:
    """PT-MoE's published figures (arXiv:2505.09519), as they are shipped."""
    facts: dict[str, Any] = json.loads(files("ptmoe.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return facts


def distinct_name(name: str, what: str = "domain") -> str:
    """The name of a domain or task as a column, apart from the columns that a table has anyway."""
    return f"{name} ({what})" if name in COLUMN_NAMES else name


def example_scores(marks: Sequence[pd.DataFrame], metric: str, less: Sequence[pd.DataFrame] = ()) -> pd.DataFrame:
    """Each example's `score` in percent, the mean over seeds, and its `domain`; the index is the example's id.

    Args:
        marks: of each seed (`Cell.marks`); the examples that all of them have are used, except those of one id that ask
            different things, as the lines of a file do that was changed meanwhile.
        metric: of the scores.
        less: of another method: then the scores are the differences on the same examples.

    Raises:
        PtmoeError: there is no such example, or a prediction lacks the metric.
    """
    frames = (*marks, *less)
    asked = pd.concat([frame["asked"] for frame in frames], axis=1, join="inner")
    ids = sorted(name for name, row in zip(asked.index, asked.to_numpy(), strict=True) if len({*row} - {""}) <= 1)
    if not ids:
        raise PtmoeError("no example was answered by all of them")
    try:
        means = [np.mean([100 * frame.loc[ids, metric] for frame in side], axis=0) for side in (marks, less) if side]
    except KeyError as error:
        raise PtmoeError(f"a line of the predictions has no score {error}") from None
    values = means[0] - means[1] if less else means[0]
    return pd.DataFrame({"score": values, "domain": marks[0].loc[ids, "domain"]}, index=ids)


def _asked(prediction: Prediction) -> str:
    whole = prediction.answered and not prediction.cut  # each method has room for inputs of another length
    return json.dumps([prediction.prompt, prediction.references]) if whole else ""


def score_groups(scores: pd.DataFrame, *, by_domain: bool, weight: float = 1.0) -> list[Group]:
    """The groups that a figure is the mean of.

    Args:
        by_domain: the figure is the plain mean of the domains, not the mean over all examples.
        weight: of all groups together.
    """
    values = scores["score"]
    parts = [part for _, part in values.groupby(scores["domain"])] if by_domain else [values]
    return [Group(weight / len(parts), part.to_numpy()) for part in parts]


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
    cell = Cell(
        label=run.result.name,
        method=run.result.method,
        task=str(run.config.get("task") or run.config.get("data") or "–"),
        eval_tasks=list(run.evaluations),
        seed=int(run.config.get("seed", 0)) if run.environment.seed is None else run.environment.seed,
        trainable_parameters=run.result.trainable_parameters,
        run=run,
    )
    return Comparison(Path(folder), run.config, (cell,), single=True)


def read_comparison(folder: str | Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        PtmoeError: it is not a folder, its plan or its search is damaged, or no cell in it is finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PtmoeError(f"{folder} is not a folder: give the folder of a comparison")
    plan = read_yaml(folder / PLAN_FILE) if (folder / PLAN_FILE).exists() else {}
    cells, left_out = _cells(folder, plan)
    if not cells:
        first = next((f"; {cell.label} on {cell.task}: {cell.reason}" for cell in left_out if cell.reason), "")
        raise PtmoeError(
            f"{folder} has no finished cell ({counted_states(left_out) or 'no cell at all'}{first}): a finished cell "
            f"has a cells/LABEL/TASK/seed-N/{CELL_FILE}; run `ptmoe compare` to its end"
        )
    place = _order(plan)
    cells.sort(key=lambda cell: (place(cell), cell.seed))
    searched = RateSearch.read_lines(folder / SEARCH_FILE)
    missing = _not_started(plan, cells, left_out)
    return Comparison(folder, plan, tuple(cells), (*left_out, *missing), searches=tuple(searched))


def _methods(plan: Mapping[str, Any]) -> dict[str, str]:
    """The methods of a plan by their labels."""
    entries = [entry if isinstance(entry, dict) else {"name": entry} for entry in plan.get("methods") or []]
    return {str(entry.get("label", entry.get("name"))): str(entry.get("name")) for entry in entries}


def _cells(folder: Path, plan: Mapping[str, Any]) -> tuple[list[Cell], list[LeftOut]]:
    """The finished cells, and the others, each with its last failure rather than that it is unfinished."""
    cells: list[Cell] = []
    left_out: dict[tuple[str, str, int | None], LeftOut] = {}
    try:
        failures = Failure.read_lines(folder / FAILED_FILE)
    except PtmoeError as error:
        failures, left_out["–", "–", None] = [], LeftOut("–", "–", None, "damaged", str(error))
    # A folder's name does not say whether an underscore was a slash, or where a file of data lies.
    labels = {file_name(name): name for name in (*_methods(plan), *(failure.label for failure in failures))}
    tasks = {file_name(str(name)): str(name) for name in plan.get("tasks") or []}
    tasks |= {file_name(failure.task): failure.task for failure in failures}
    for path in sorted((folder / "cells").glob("*/*/seed-*"), key=lambda path: _natural(path.as_posix())):
        label, task, seed = path.parts[-3:]
        label, task = labels.get(label, label.replace("__", "/")), tasks.get(task, task.replace("__", "/"))
        number = seed.removeprefix("seed-")
        key = (label, task, int(number) if number.isdecimal() else None)
        try:
            if (path / CELL_FILE).is_file():
                cells.append(_cell(path, cells))
            else:
                left_out[key] = LeftOut(*key, "unfinished")
        except PtmoeError as error:
            left_out[key] = LeftOut(*key, "damaged", str(error))
    finished = {(cell.label, cell.task, cell.seed) for cell in cells}
    for failure in failures:
        if failure.cell not in finished and (failure.cell not in left_out or left_out[failure.cell].state != "damaged"):
            left_out[failure.cell] = LeftOut(*failure.cell, "failed", failure.error)
    return cells, list(left_out.values())


def _cell(path: Path, others: Sequence[Cell]) -> Cell:
    """A finished cell whose files agree; with `others`, a label is one method at one size, and no cell repeats."""
    record, run = CellRecord.read(path / CELL_FILE), read_run(path)
    tasks: list[str] = []
    for name in record.eval_tasks:
        tasks += [name] if name in run.evaluations else GROUPS.get(name, [name])
    if not tasks:
        raise PtmoeError(f"{path / CELL_FILE}: eval_tasks is empty")
    if absent := [task for task in tasks if task not in run.evaluations]:
        raise PtmoeError(f"{path / 'eval'} lacks {', '.join(absent)}")
    for name in ("method", "trainable_parameters"):
        value, trained = getattr(record, name), getattr(run.result, name)
        if value != trained:
            raise PtmoeError(f"{path}: {CELL_FILE} has {name}={value}, result.json {trained}")
    for other in (other for other in others if other.label == record.label):
        for name in ("method", "size", "trainable_parameters"):
            value, earlier = getattr(record, name), getattr(other, name)
            if value != earlier:
                where = f"{other.run.folder}, which has the same label"
                raise PtmoeError(f"{path}: {name}={value}, but {earlier} in {where}")
        if (other.task, other.seed) == (record.task, record.seed):
            raise PtmoeError(f"{path} repeats {other.run.folder}")
    return Cell(**{**dict(record), "eval_tasks": list(dict.fromkeys(tasks)), "run": run})


def _not_started(plan: Mapping[str, Any], cells: Sequence[Cell], left_out: Sequence[LeftOut]) -> Iterator[LeftOut]:
    """What is missing from the grid of all labels, tasks and seeds that anything is known of."""
    known = {(cell.label, cell.task, cell.seed) for cell in cells}
    known |= {(cell.label, cell.task, cell.seed) for cell in left_out if cell.seed is not None}
    # What trains nothing is the same for every seed and every task.
    untrained = {label for label, method in _methods(plan).items() if method == BASE}
    untrained |= {cell.label for cell in cells if not cell.trainable_parameters}
    labels, tasks, seeds = (sorted(set(part), key=str) for part in zip(*known, strict=True))
    for label, task, seed in product(labels, tasks, seeds):
        if label not in untrained and (label, task, seed) not in known:
            yield LeftOut(str(label), str(task), int(seed), "not started")


def _order(plan: Mapping[str, Any]) -> Callable[[Cell], tuple[Any, ...]]:
    """Sorts cells by the plan's labels or methods, otherwise by the methods' own order; then by task."""
    from ptmoe.methods import METHODS, MethodConfig

    labels = list(_methods(plan))
    tasks = plan.get("tasks") or []

    def rank(method: str) -> int:
        return METHODS[method].order if method in METHODS else MethodConfig.order if method.startswith(OF_PEFT) else -1

    def key(cell: Cell) -> tuple[Any, ...]:
        listed = next((labels.index(name) for name in (cell.label, cell.method) if name in labels), len(labels))
        task = tasks.index(cell.task) if cell.task in tasks else len(tasks)
        return listed, rank(cell.method), _natural(cell.label), task, _natural(cell.task)

    return key


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts "N=2" before "N=10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
