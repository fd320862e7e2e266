"""What a comparison's scores come to: means over seeds with their intervals, averages over tasks, paired tests.

All scores are in percent. The average is the plain mean over a table's tasks, as in PT-MoE's paper, and for SVAMP a
method's figure is the plain mean of its four types, which is the paper's form, too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from ptmoe.errors import PtmoeError
from ptmoe.report.comparison import ALL, AVERAGE, MEAN, Comparison, distinct_name, example_scores, paper, score_groups
from ptmoe.tasks.metrics import MACRO_F1
from ptmoe.tasks.resampling import Group, bootstrap_interval, sign_flip_p, weighted_mean

ALPHA = 0.05


class Score(NamedTuple):
    """A label's score: its mean over seeds, and the ends of a 95 % interval, over seeds by Student's t or over a single
    seed's examples by the bootstrap."""

    mean: float
    seeds: tuple[int, ...] = ()
    low: float | None = None
    high: float | None = None
    over: Literal["seeds", "examples"] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval as it is drawn, within what a score can be; the mean where there is none."""
        if self.low is None or self.high is None:
            return self.mean, self.mean
        return max(0.0, self.low), min(100.0, self.high)

    @property
    def interval(self) -> str:
        """As printed: ± over seeds, where it is symmetric, and its ends over examples; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"± {(self.high - self.low) / 2:.1f}" if self.over == "seeds" else f"[{self.low:.1f}, {self.high:.1f}]"


class Column(NamedTuple):
    """A score that a table has a column for: of a task, after training on another or the same, over all its examples or
    as the mean of its domains (`of`). No other column of the table has its `name`."""

    name: str
    trained_on: str
    task: str
    of: str


class PairedTest(NamedTuple):
    """The first two labels of a board on the examples of a column that both answered, with the seeds that both have."""

    name: str  # of the column, or `AVERAGE`
    difference: Score  # the first less the second, with the bootstrap's interval over examples
    p: float  # two-sided, of the sign-flip test
    p_holm: float | None  # corrected for the number of tasks; None for the average
    examples: int


@dataclass(frozen=True)
class Board:
    """A table in the paper's form: rows are labels, columns tasks, then the average; all of one metric."""

    metric: str
    ranks: bool  # whether its metric is the one that ranks methods on these tasks
    columns: tuple[Column, ...]  # the tasks
    # By label and column name or `AVERAGE`; nothing where no cell is finished. A label that lacks a task has no
    # average, since averages over different tasks cannot be compared.
    scores: Mapping[tuple[str, str], Score]
    ranking: tuple[str, ...]  # the labels that have an average, the highest first
    # Between the first two of them, for each task, and of the averages where every task has one; none of a metric that
    # single examples do not have.
    tests: tuple[PairedTest, ...] = ()
    test_notes: tuple[str, ...] = ()  # the tasks that have no test, or one on some of their examples only, and why

    @property
    def names(self) -> list[str]:
        """Of the columns with scores: the tasks, and the average where there are several."""
        return [column.name for column in self.columns] + [AVERAGE] * (len(self.columns) > 1)


def boards(comparison: Comparison) -> list[Board]:
    """A table for each metric, those that rank methods first."""
    if comparison.scores.empty:
        return []
    made = [_board(comparison, str(metric), rows) for metric, rows in comparison.scores.groupby("metric", sort=False)]
    return sorted(made, key=lambda board: not board.ranks)


def _board(comparison: Comparison, metric: str, rows: pd.DataFrame) -> Board:
    pairs = list(rows[["trained on", "task"]].drop_duplicates().itertuples(index=False, name=None))
    evaluated = [task for _, task in pairs]
    means = set(rows.loc[rows["of"] == MEAN, "task"]) & set(paper()["mean_of_domains"])
    columns = tuple(
        Column(
            distinct_name(task, "task") if evaluated.count(task) == 1 else f"{task} after {trained_on}",
            trained_on,
            task,
            MEAN if task in means else ALL,
        )
        for trained_on, task in pairs
    )
    names = {column[1:]: column.name for column in columns}
    shown = rows.assign(
        column=[names.get(place) for place in rows[["trained on", "task", "of"]].itertuples(index=False, name=None)]
    )
    scores = {key: score_of(part) for key, part in shown.groupby(["label", "column"], sort=False)}
    for label, of_label in shown.dropna(subset="column").groupby("label", sort=False):
        found = [scores[label, column.name] for column in columns if (label, column.name) in scores]
        if len(found) == len(columns):
            scores[label, AVERAGE] = _average(found, of_label, [column.task for column in columns])
    ranked = [label for label in comparison.labels if (label, AVERAGE) in scores]
    ranking = tuple(sorted(ranked, key=lambda label: -scores[label, AVERAGE].mean))
    testable = len(ranking) > 1 and metric != MACRO_F1  # which no single example has
    tests, notes = _paired_tests(comparison, metric, columns, *ranking[:2]) if testable else ((), ())
    return Board(metric, bool(rows["ranks"].any()), columns, scores, ranking, tuple(tests), tuple(notes))


def part_scores(comparison: Comparison, column: Column, metric: str) -> dict[str, dict[str, Score]]:
    """Over all examples, as the domains' mean, and in each domain: each label's score, where it has one."""
    found: dict[str, dict[str, Score]] = {}
    rows = comparison.scores
    here = (rows["trained on"] == column.trained_on) & (rows["task"] == column.task) & (rows["metric"] == metric)
    for (of, label), part in rows[here].groupby(["of", "label"], sort=False):
        found.setdefault(of, {})[label] = score_of(part)
    return found


def score_of(rows: pd.DataFrame) -> Score:
    """From a row of the long table for each seed of a label, at least one."""
    values, seeds = rows["score"].to_numpy(float), tuple(map(int, rows["seed"]))
    # What trains nothing gives the same answers for every seed: an interval over seeds would claim certainty.
    if len(values) > 1 and rows["trainable parameters"].iat[0]:
        return Score(float(values.mean()), seeds, *t_interval(values), "seeds")
    low, high = rows[["score low", "score high"]].to_numpy(float)[0]
    if math.isnan(low):
        return Score(float(values.mean()), seeds)
    return Score(float(values.mean()), seeds, float(low), float(high), "examples")


def _average(scores: Sequence[Score], rows: pd.DataFrame, tasks: Sequence[str]) -> Score:
    """The plain mean over columns, from their scores, the rows of these and each column's task.

    Over seeds, each seed's own average is one value. For single seeds, the tasks' examples are independent of each
    other, so the half-widths of their intervals add as the root of the squares; those of one task after several
    trainings, which are of the same examples, add as they are.
    """
    if len(scores) == 1:
        return scores[0]
    mean, seeds = float(np.mean([score.mean for score in scores])), scores[0].seeds
    if any(score.seeds != seeds for score in scores):
        return Score(mean, tuple(sorted({seed for score in scores for seed in score.seeds})))
    if all(score.over == "seeds" for score in scores):
        return Score(mean, seeds, *t_interval(rows.groupby("seed")["score"].mean()), "seeds")
    ends = np.array([(score.mean, score.low, score.high) for score in scores], dtype=float)
    if np.isnan(ends).any():
        return Score(mean, seeds)
    halves = pd.DataFrame(np.abs(ends[:, :1] - ends[:, 1:])).groupby(list(tasks)).sum()
    below, above = np.linalg.norm(halves, axis=0) / len(scores)
    return Score(mean, seeds, float(mean - below), float(mean + above), "examples")


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean by Student's t, over at least two values, such as one for each seed."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} value(s): an interval over them needs at least 2")
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of any false finding among these p values stays at the level they are read at."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return [float(p) for p in corrected]


def paired_test(groups: Sequence[Group], name: str = "", seeds: Iterable[int] = ()) -> PairedTest:
    """Whether per-example differences, the values of the groups, could be chance."""
    difference = Score(weighted_mean(groups), tuple(sorted(seeds)), *bootstrap_interval(groups), "examples")
    return PairedTest(name, difference, sign_flip_p(groups), None, sum(len(group.values) for group in groups))


def _paired_tests(
    comparison: Comparison, metric: str, columns: Sequence[Column], first: str, second: str
) -> tuple[list[PairedTest], list[str]]:
    tests: list[PairedTest] = []
    by_task: dict[str, list[pd.DataFrame]] = {}  # the differences after each training
    notes: list[str] = []
    for column in columns:
        pairs = [
            (one, other)
            for one in comparison.of(first, column.trained_on)
            for other in comparison.of(second, column.trained_on)
            # What trains nothing is compared with every seed.
            if one.seed == other.seed or not (one.trainable_parameters and other.trainable_parameters)
        ]
        try:
            if not pairs:
                raise PtmoeError("no seed is finished for both")
            marks, less = ([cell.marks(column.task) for cell in side] for side in zip(*pairs, strict=True))
            differences = example_scores(marks, metric, less)
        except PtmoeError as error:
            notes.append(f"{column.name}: {error}.")
            continue
        seeds = {max(pair, key=lambda cell: cell.trainable_parameters > 0).seed for pair in pairs}
        tests.append(paired_test(score_groups(differences, by_domain=column.of == MEAN), column.name, seeds))
        by_task.setdefault(column.task, []).append(differences)
        answered, most = tests[-1].examples, max(map(len, (*marks, *less)))
        if answered < most:
            notes.append(f"{column.name}: only the {answered:,} of {most:,} examples that all cells answered.")
    corrected = holm([test.p for test in tests])
    tests = [test._replace(p_holm=p) for test, p in zip(tests, corrected, strict=True)]
    if len(tests) == len(columns) > 1:
        shared = set.intersection(*(set(test.difference.seeds) for test in tests))
        of, everything = {column.task: column.of for column in columns}, list[Group]()
        for task, found in by_task.items():  # an example that several trainings were tested on is one example
            mean = pd.concat(found).groupby(level=0).agg({"score": "mean", "domain": "first"})
            everything += score_groups(mean, by_domain=of[task] == MEAN, weight=len(found) / len(columns))
        tests.append(paired_test(everything, AVERAGE, shared))
    return tests, notes
