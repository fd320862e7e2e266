"""A comparison's folder as typed values: methods at their sizes × tasks × seeds.

COMPARISON/comparison.yaml                 the resolved plan
COMPARISON/cells/LABEL/TASK/seed-N/        a run folder; its `cell.json` is written last, so a cell with one is finished
COMPARISON/failed.jsonl                    a line for each cell that failed

A label is one method at one size, trained on each task with each seed. A cell that is damaged is named and left out;
the others are reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ptmoe.errors import PtmoeError
from ptmoe.report.runs import Run, parse, parse_lines, read_run, yaml_mapping
from ptmoe.tasks import GROUPS

# PT-MoE's paper lists the methods so; a label stands where its method does, unless the plan says otherwise.
PAPER_ORDER = ("base", "ft", "lora", "hydralora", "pt", "dpt", "smop", "attempt", "pt-moe")


@dataclass(frozen=True)
class CellFile:
    """`cell.json`."""

    label: str
    method: str
    task: str
    eval_tasks: list[str]
    seed: int
    trainable_parameters: int
    size: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """One line of `predictions/TASK.jsonl`, as far as a comparison needs it; scores by metric, from 0 to 1."""

    id: str
    scores: dict[str, float]
    domain: str = ""


@dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        label: a method at a size.
        method, size: what that is.
        task: that it was trained on.
        eval_tasks: that it was evaluated on, each in `run.evaluations`.
        seed: of the training.
        trainable_parameters: that were trained.
        run: its folder's contents.
    """

    label: str
    method: str
    size: Mapping[str, Any]
    task: str
    eval_tasks: tuple[str, ...]
    seed: int
    trainable_parameters: int
    run: Run

    def marks(self, task: str) -> dict[str, Mark]:
        """Each example's scores on an evaluated task, by example id.

        Raises:
            PtmoeError: the predictions are missing or damaged, or an id repeats.
        """
        path = self.run.predictions[task]
        if not path.is_file():
            raise PtmoeError(f"{path} is missing")
        lines = parse_lines(Mark, path)
        marks = {mark.id: mark for mark in lines}
        if len(marks) < len(lines) or not marks:
            raise PtmoeError(f"{path}: {len(lines)} line(s) with {len(marks)} different id(s), needs one for each")
        return marks


@dataclass(frozen=True)
class LeftOut:
    """A cell that the numbers do without: it failed, is damaged, was begun, or was not begun."""

    label: str
    task: str
    seed: int | None
    state: Literal["failed", "damaged", "unfinished", "not started"]
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """One line of `failed.jsonl`."""

    label: str
    task: str
    error: str
    seed: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What a comparison's folder holds.

    Attributes:
        folder: where it was read from.
        plan: `comparison.yaml`.
        cells: those that are finished, at least one, ordered by label, task and seed.
        left_out: all others.
    """

    folder: Path
    plan: dict[str, Any]
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(cell.label for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """Of what was trained."""
        return sorted({cell.seed for cell in self.cells if cell.trainable_parameters})

    def of(self, label: str, task: str | None = None) -> list[Cell]:
        """The cells of a label, or only those that were trained on a task, by seed."""
        return [cell for cell in self.cells if cell.label == label and task in (None, cell.task)]


def read_comparison(folder: str | Path) -> Comparison:
    """Read a comparison's folder.

    Raises:
        PtmoeError: it is none, its plan is damaged, or no cell in it is finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PtmoeError(f"{folder} is not a folder: give the folder of a comparison")
    path = folder / "comparison.yaml"
    plan = yaml_mapping(path) if path.exists() else {}
    cells, left_out = _cells(folder)
    left_out += _failures(folder, cells)
    if not cells:
        states = [one.state for one in left_out]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no cell at all"
        first = next((f"; {one.label} on {one.task}: {one.reason}" for one in left_out if one.reason), "")
        raise PtmoeError(
            f"{folder} has no finished cell ({counted}{first}): a finished cell has a "
            "cells/LABEL/TASK/seed-N/cell.json; run `ptmoe compare` to its end"
        )
    order = _order(plan)
    tasks = _listed(plan, "tasks", "task")
    places = {task: tasks.index(task) if task in tasks else len(tasks) for task in {cell.task for cell in cells}}
    cells.sort(key=lambda cell: (order(cell.label, cell.method), places[cell.task], _natural(cell.task), cell.seed))
    return Comparison(folder, plan, tuple(cells), (*_last_words(left_out), *_not_started(cells, left_out)))


def _cells(folder: Path) -> tuple[list[Cell], list[LeftOut]]:
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for place in sorted((folder / "cells").glob("*/*/seed-*"), key=lambda path: _natural(path.as_posix())):
        label, task, seed = _named(place)
        if not (place / "cell.json").is_file():
            left_out.append(LeftOut(label, task, seed, "unfinished"))
            continue
        try:
            cell = _cell(place)
            _check_against(cell, cells)
        except PtmoeError as error:
            left_out.append(LeftOut(label, task, seed, "damaged", str(error)))
        else:
            cells.append(cell)
    return cells, left_out


def _cell(place: Path) -> Cell:
    written = parse(CellFile, place / "cell.json")
    run = read_run(place)
    named = [member for name in written.eval_tasks for member in _members(name, run)]
    if not named:
        raise PtmoeError(f"{place / 'cell.json'}: eval_tasks is empty")
    if absent := [task for task in named if task not in run.evaluations]:
        raise PtmoeError(f"{place / 'eval'} lacks {', '.join(absent)}")
    for name, value in (("method", written.method), ("trainable_parameters", written.trainable_parameters)):
        if getattr(run.result, name) != value:
            raise PtmoeError(f"{place}: cell.json says {name}={value}, result.json {getattr(run.result, name)}")
    return Cell(
        label=written.label,
        method=written.method,
        size=written.size,
        task=written.task,
        eval_tasks=tuple(dict.fromkeys(named)),
        seed=written.seed,
        trainable_parameters=written.trainable_parameters,
        run=run,
    )


def _members(name: str, run: Run) -> Sequence[str]:
    return [name] if name in run.evaluations else GROUPS.get(name, [name])


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
    path = folder / "failed.jsonl"
    if not path.exists():
        return []
    try:
        failures = parse_lines(Failure, path)
    except PtmoeError as error:
        return [LeftOut("–", "–", None, "damaged", str(error))]
    finished = {(cell.label, cell.task, cell.seed) for cell in cells}
    return [
        LeftOut(one.label, one.task, one.seed, "failed", one.error)
        for one in failures
        if (one.label, one.task, one.seed) not in finished
    ]


def _last_words(left_out: Sequence[LeftOut]) -> list[LeftOut]:
    """One entry for each cell: its last failure, rather than that it is unfinished."""
    kept: dict[tuple[str, str, int | None], LeftOut] = {}
    for one in left_out:
        key = (one.label, one.task, one.seed)
        if key not in kept or kept[key].state in ("unfinished", "failed"):
            kept[key] = one
    return list(kept.values())


def _not_started(cells: Sequence[Cell], left_out: Sequence[LeftOut]) -> Iterator[LeftOut]:
    """What the grid of all labels, tasks and seeds that anything is known of lacks."""
    known = {(cell.label, cell.task, cell.seed) for cell in cells}
    known |= {(one.label, one.task, one.seed) for one in left_out if one.seed is not None}
    trained = {cell.label for cell in cells if cell.trainable_parameters} | {one.label for one in left_out}
    labels, tasks, seeds = (sorted({key[part] for key in known}, key=str) for part in range(3))
    for label, task, seed in product(labels, tasks, seeds):
        # What trains nothing is the same for every seed and every task it was trained on.
        if label in trained and (label, task, seed) not in known:
            yield LeftOut(str(label), str(task), int(seed), "not started")


def _named(place: Path) -> tuple[str, str, int | None]:
    """Label, task and seed that a cell's folders name."""
    label, task, seed = (part.replace("__", "/") for part in place.parts[-3:])
    number = seed.removeprefix("seed-")
    return label, task, int(number) if number.isdecimal() else None


def _order(plan: Mapping[str, Any]) -> Any:
    """Where a label stands: as the plan lists labels or methods, else as the paper does; then by its own numbers."""
    listed = _listed(plan, "labels", "methods")
    places = {name: place for place, name in reversed(list(enumerate([*listed, *PAPER_ORDER])))}
    last = len(places) + len(listed)

    def key(label: str, method: str) -> tuple[Any, ...]:
        return places.get(label, places.get(method, last)), _natural(label)

    return key


def _listed(plan: Mapping[str, Any], *keys: str) -> list[str]:
    """The names under a plan's keys: a list of them, of mappings with a label or name, a mapping by name, or one."""
    values = [plan[key] for key in keys if plan.get(key)]
    written = [one for value in values for one in (value if isinstance(value, list | dict) else [value])]
    return [str(one.get("label", one.get("name"))) if isinstance(one, dict) else str(one) for one in written]


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts "N=2" before "N=10"."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
