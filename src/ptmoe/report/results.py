"""What a comparison's cells come to: means over seeds with their intervals, averages over tasks, paired tests.

All scores are in percent. The average is the plain mean over a table's tasks, as in PT-MoE's paper, and for SVAMP a
method's figure is the plain mean of its four types, which is the paper's form, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ptmoe.errors import PtmoeError
from ptmoe.report.comparison import Cell, Comparison, Mark
from ptmoe.report.published import BY_DOMAIN_MEAN
from ptmoe.report.statistics import Group, PairedTest, bootstrap_interval, holm, paired_test, t_interval

ALPHA = 0.05


@dataclass(frozen=True)
class Column:
    """A score that a table has a column for.

    Attributes:
        trained_on: the task that the cells were trained on.
        task: that they were evaluated on.
        metric: of it.
        mean_of_domains: the figure is the plain mean of the task's domains, not the mean over all its examples.
        name: as shown; no other column of the table has it.
    """

    trained_on: str
    task: str
    metric: str
    mean_of_domains: bool
    name: str

    def score(self, cell: Cell) -> float:
        """A cell's."""
        evaluation = cell.run.evaluations[self.task]
        return (evaluation.mean_of_domains if self.mean_of_domains else evaluation.metrics)[self.metric]

    def interval(self, cell: Cell) -> tuple[float, float] | None:
        """A cell's, by the bootstrap over its examples; None where what it needs was not written."""
        if not self.mean_of_domains:
            return cell.run.evaluations[self.task].interval.get(self.metric)
        try:
            return bootstrap_interval(self.groups([cell.marks(self.task)]))
        except PtmoeError:
            return None

    def groups(self, marks: Sequence[Mapping[str, Mark]], less: Sequence[Mapping[str, Mark]] = ()) -> list[Group]:
        """Per-example scores, each the mean over seeds, in the groups that the figure is a mean of.

        Args:
            marks: of each seed, the examples' by id; an id counts that all of them hold.
            less: of another method: then the values are the differences on the same examples.

        Raises:
            PtmoeError: there is no such id.
        """
        ids = sorted(set.intersection(*(set(one) for one in (*marks, *less))))
        if not ids:
            raise PtmoeError("no example was answered by all of them")
        values = self._mean(marks, ids) - (self._mean(less, ids) if less else 0.0)
        domains = np.array([marks[0][one].domain for one in ids])
        names = sorted(set(domains)) if self.mean_of_domains else []
        parts = [values[domains == name] for name in names] or [values]
        return [Group(1 / len(parts), part) for part in parts]

    def _mean(self, marks: Sequence[Mapping[str, Mark]], ids: Sequence[str]) -> Any:
        try:
            return np.mean([[100 * one[name].scores[self.metric] for name in ids] for one in marks], axis=0)
        except KeyError as error:
            raise PtmoeError(f"a line of the predictions has no score {error}") from None


@dataclass(frozen=True)
class Score:
    """A label's score.

    Attributes:
        mean: over its seeds.
        seeds: those.
        interval: 95 %.
        over: what the interval is over: `seeds`, Student's t; `examples`, the bootstrap over a single seed's examples.
    """

    mean: float
    seeds: tuple[int, ...]
    interval: tuple[float, float] | None = None
    over: Literal["seeds", "examples"] | None = None


@dataclass(frozen=True)
class Row:
    """A label's scores, one for each column of its table, None where no cell of it is finished."""

    label: str
    method: str
    size: Mapping[str, Any]
    trainable_parameters: int
    scores: tuple[Score | None, ...]
    average: Score | None


@dataclass(frozen=True)
class Paired:
    """Two labels on one task's examples: the test, and `p_holm`, corrected for the number of tasks."""

    name: str
    examples: int
    seeds: tuple[int, ...]
    test: PairedTest
    p_holm: float | None


@dataclass(frozen=True)
class PairedTests:
    """Between the first two labels of a table by average.

    Attributes:
        first, second: the labels.
        tasks: a test for each task.
        average: a test of the two averages, where there are several tasks and each has a test.
        notes: tasks that have no test, or one on some of their examples only, and why.
    """

    first: str
    second: str
    tasks: tuple[Paired, ...]
    average: Paired | None
    notes: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scoreboard:
    """A table in the paper's form: rows are labels, columns tasks, then the average; all of one metric.

    Attributes:
        metric: of all columns.
        ranks: whether it is the one that ranks methods on these tasks.
        columns: the tasks.
        rows: the labels, in the comparison's order.
        paired: tests between the first two; None where fewer have an average.
    """

    metric: str
    ranks: bool
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    paired: PairedTests | None

    @property
    def ranking(self) -> list[Row]:
        """The rows that have an average, the highest first."""
        return sorted((row for row in self.rows if row.average), key=lambda row: -_average(row).mean)


def scoreboards(comparison: Comparison) -> list[Scoreboard]:
    """A table for each metric, those that rank methods first."""
    boards = []
    for metric, ranks in _metrics(comparison).items():
        columns = columns_of(comparison, metric)
        rows = tuple(_row(comparison, label, columns) for label in comparison.labels)
        board = Scoreboard(metric, ranks, columns, rows, None)
        boards.append(Scoreboard(metric, ranks, columns, rows, _paired_tests(comparison, board)))
    return sorted(boards, key=lambda board: not board.ranks)


def columns_of(comparison: Comparison, metric: str) -> tuple[Column, ...]:
    """Each task that has a metric, once for each task that was trained on for it, in the order the cells name them."""
    pairs = {
        (cell.task, task): cell.run.evaluations[task]
        for cell in comparison.cells
        for task in cell.eval_tasks
        if metric in cell.run.evaluations[task].metrics
    }
    evaluated = [task for _, task in pairs]
    return tuple(
        Column(
            trained_on=trained_on,
            task=task,
            metric=metric,
            mean_of_domains=task in BY_DOMAIN_MEAN and metric in evaluation.mean_of_domains,
            name=task if evaluated.count(task) == 1 else f"{task} after {trained_on}",
        )
        for (trained_on, task), evaluation in pairs.items()
    )


def label_score(cells: Sequence[Cell], column: Column) -> Score | None:
    """A label's score in a column, from its cells; None where there are none."""
    scored = [cell for cell in cells if cell.task == column.trained_on and column.task in cell.eval_tasks]
    if not scored:
        return None
    values = [column.score(cell) for cell in scored]
    seeds = tuple(cell.seed for cell in scored)
    mean = float(np.mean(values))
    # What trains nothing gives the same answers for every seed: an interval over seeds would claim certainty.
    if len(values) > 1 and scored[0].trainable_parameters:
        return Score(mean, seeds, t_interval(values), "seeds")
    interval = column.interval(scored[0])
    return Score(mean, seeds, interval, "examples" if interval else None)


def domain_score(cells: Sequence[Cell], column: Column, domain: str) -> Score | None:
    """A label's score on one domain of a column's task; without an interval where there is one seed."""
    found = {
        cell.seed: float(value)
        for cell in cells
        if cell.task == column.trained_on and column.task in cell.eval_tasks
        if (part := cell.run.evaluations[column.task].by_domain.get(domain)) is not None
        and (value := getattr(part, column.metric)) is not None
    }
    if not found:
        return None
    values = list(found.values())
    over_seeds = len(values) > 1 and cells[0].trainable_parameters
    return Score(
        float(np.mean(values)),
        tuple(found),
        t_interval(values) if over_seeds else None,
        "seeds" if over_seeds else None,
    )


def _metrics(comparison: Comparison) -> dict[str, bool]:
    """The metrics of all evaluations, and whether methods are ranked by them."""
    metrics: dict[str, bool] = {}
    for cell in comparison.cells:
        for task in cell.eval_tasks:
            evaluation = cell.run.evaluations[task]
            for metric in evaluation.metrics:
                metrics[metric] = metrics.get(metric, False) or metric == evaluation.metric
    return metrics


def _row(comparison: Comparison, label: str, columns: Sequence[Column]) -> Row:
    cells = comparison.of(label)
    scores = tuple(label_score(cells, column) for column in columns)
    first = cells[0]
    return Row(label, first.method, first.size, first.trainable_parameters, scores, _average_of(cells, columns, scores))


def _average_of(cells: Sequence[Cell], columns: Sequence[Column], scores: Sequence[Score | None]) -> Score | None:
    """The plain mean over tasks; None where a task lacks, since averages over different tasks cannot be compared.

    Over seeds, each seed's own average is one value. Of single seeds, the tasks' examples are independent of each
    other, so the half-widths of their intervals add as the root of the squares.
    """
    found = [score for score in scores if score is not None]
    if len(found) < len(columns):
        return None
    if len(found) == 1:
        return found[0]
    mean = float(np.mean([score.mean for score in found]))
    seeds = found[0].seeds
    if any(score.seeds != seeds for score in found):
        return Score(mean, tuple(sorted({seed for score in found for seed in score.seeds})))
    if all(score.over == "seeds" for score in found):
        by_seed = [float(np.mean([label_value(cells, column, seed) for column in columns])) for seed in seeds]
        return Score(mean, seeds, t_interval(by_seed), "seeds")
    intervals = [(score.mean, score.interval) for score in found]
    if any(interval is None for _, interval in intervals):
        return Score(mean, seeds)
    below = math.hypot(*(mean - interval[0] for mean, interval in intervals if interval)) / len(found)
    above = math.hypot(*(interval[1] - mean for mean, interval in intervals if interval)) / len(found)
    return Score(mean, seeds, (mean - below, mean + above), "examples")


def label_value(cells: Iterable[Cell], column: Column, seed: int) -> float:
    """The score of the one cell of a seed."""
    return next(column.score(cell) for cell in cells if (cell.task, cell.seed) == (column.trained_on, seed))


def _average(row: Row) -> Score:
    assert row.average is not None
    return row.average


def _paired_tests(comparison: Comparison, board: Scoreboard) -> PairedTests | None:
    ranking = board.ranking
    if len(ranking) < 2:
        return None
    first, second = ranking[0].label, ranking[1].label
    tested: list[tuple[Column, tuple[int, ...], list[Group]]] = []
    notes: list[tuple[str, str]] = []
    for column in board.columns:
        pairs = _same_seeds(comparison.of(first, column.trained_on), comparison.of(second, column.trained_on))
        try:
            if not pairs:
                raise PtmoeError("no seed is finished for both")
            marks = [(one.marks(column.task), other.marks(column.task)) for one, other in pairs]
            groups = column.groups([one for one, _ in marks], [other for _, other in marks])
        except PtmoeError as error:
            notes.append((column.name, str(error)))
        else:
            tested.append((column, tuple(one.seed for one, _ in pairs), groups))
            most = max(len(one) for pair in marks for one in pair)
            if _examples(groups) < most:
                notes.append(
                    (column.name, f"only the {_examples(groups):,} of {most:,} examples that all cells answered")
                )
    tests = [paired_test(groups) for *_, groups in tested]
    corrected = holm([test.p for test in tests])
    tasks = tuple(
        Paired(column.name, _examples(groups), seeds, test, p)
        for (column, seeds, groups), test, p in zip(tested, tests, corrected, strict=True)
    )
    average = None
    if len(tested) == len(board.columns) > 1:
        everything = [Group(one.weight / len(tested), one.values) for *_, groups in tested for one in groups]
        seeds = tuple(sorted(set.intersection(*(set(seeds) for _, seeds, _ in tested))))
        average = Paired("average", _examples(everything), seeds, paired_test(everything), None)
    return PairedTests(first, second, tasks, average, tuple(notes))


def _same_seeds(first: Sequence[Cell], second: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """Cells of both with the same seed. What trains nothing stands beside every seed."""
    if first and second and not first[0].trainable_parameters:
        return [(first[0], cell) for cell in second]
    if first and second and not second[0].trainable_parameters:
        return [(cell, second[0]) for cell in first]
    others = {cell.seed: cell for cell in second}
    return [(cell, others[cell.seed]) for cell in first if cell.seed in others]


def _examples(groups: Iterable[Group]) -> int:
    return sum(len(group.values) for group in groups)
