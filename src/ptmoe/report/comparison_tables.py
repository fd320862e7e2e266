"""The tables of a comparison's report: the paper's form, paired tests, domains, curves, and every cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptmoe.report.comparison import Comparison
from ptmoe.report.frame import Entry, Frame, Row, decimal, rows, text, whole
from ptmoe.report.published import Published, paper
from ptmoe.report.results import Column, PairedTests, Score, Scoreboard, domain_score, label_score
from ptmoe.report.runs import Part
from ptmoe.report.table import best_rows, metric_name

OURS = "this comparison"
# As DESIGN and the paper write them; other sizes go by their own names.
SYMBOLS = {"num_virtual_tokens": "T", "rank": "R", "num_experts": "N"}


def score_table(comparison: Comparison, board: Scoreboard, published: Published | None) -> Frame:
    """The paper's form: rows are methods, columns parameters, tasks and their average."""
    several = len(board.columns) > 1
    columns = [*zip(*(row.scores for row in board.rows), strict=True)]
    if several:
        columns.append(tuple(row.average for row in board.rows))
    best = [best_scores(column) for column in columns]
    lines = []
    for index, row in enumerate(board.rows):
        scores = [*row.scores, *([row.average] if several else [])]
        seeds = sorted({seed for score in scores if score for seed in score.seeds})
        lines.append(
            Row(
                (
                    text(row.label, size_in_words(row.size)),
                    whole(row.trainable_parameters),
                    *(score_entry(score, index in found) for score, found in zip(scores, best, strict=True)),
                    whole(len(seeds)) if row.trainable_parameters else Entry(None, "–"),
                ),
                OURS if published else "",
            )
        )
    for known in published.rows if published else ():
        averaged = [known.average] if several else []
        lines.append(
            Row(
                (
                    text(known.method),
                    Entry(known.parameters, known.parameters),
                    *(decimal(value) for value in (*known.scores, *averaged)),
                    Entry(None, "–"),
                ),
                f"published: {published.source}, {published.base}" if published else "",
            )
        )
    names = [column.name for column in board.columns]
    return Frame(
        f"scores {board.metric}",
        f"{metric_name(board.metric)}, %",
        ("method", "trainable parameters", *names, *(["average"] if several else []), "seeds"),
        tuple(lines),
        " ".join(_score_notes(board, several, published)),
    )


def paired_table(tests: PairedTests, metric: str) -> Frame:
    """A row for each task, then the average: the difference, its interval, p and Holm's p."""
    several = len(tests.tasks) > 1
    lines = [
        [
            text(one.name),
            Entry(one.test.difference, f"{one.test.difference:+.1f}", one.test.interval, "examples"),
            Entry(one.test.p, p_in_words(one.test.p)),
            *([Entry(one.p_holm, "–" if one.p_holm is None else p_in_words(one.p_holm))] if several else []),
            whole(one.examples),
            whole(len(one.seeds)),
        ]
        for one in (*tests.tasks, *([tests.average] if tests.average else []))
    ]
    corrected = "; p (Holm) is corrected for the number of tasks" if several else ""
    notes = [
        f"{tests.first} less {tests.second}, in points of {metric_name(metric)}, each example’s score the mean over "
        "the seeds that both have. Interval: 95 %, percentile bootstrap over examples. p: two-sided sign-flip "
        f"permutation test on the same examples, 10,000 draws{corrected}. Both take the trained seeds as given: they "
        "speak of these adapters on other examples, and the ± above of other seeds."
    ]
    notes += [f"{name}: {why}." for name, why in tests.notes]
    return Frame(
        f"paired {metric}",
        f"{tests.first} against {tests.second} on the same examples",
        ("task", "difference", "p", *(["p (Holm)"] if several else []), "examples", "seeds"),
        rows(lines),
        " ".join(notes),
    )


def domain_table(comparison: Comparison, column: Column, domains: Sequence[str]) -> Frame:
    """A row for each label; over all examples, the mean of domains, and each domain."""
    scores = domain_rows(comparison, column, domains)
    best = {name: best_scores(row.values()) for name, row in scores.items()}
    known = paper()["by_domain"].get(column.task, {}) if column.metric == "accuracy" else {}
    lines = [
        Row(
            (text(label), *(score_entry(scores[name][label], index in best[name]) for name in scores)),
            OURS if known else "",
        )
        for index, label in enumerate(comparison.labels)
    ]
    for method, parts in known.items():
        figures = {"mean of domains": sum(parts.values()) / len(parts), **parts}
        source = f"published: {paper()['source']}, {paper()['base']}"
        lines.append(Row((text(method), *(decimal(figures.get(name)) for name in scores)), source))
    return Frame(
        f"domains {column.metric} {column.name}",
        f"{metric_name(column.metric)} on {column.name} by domain, %",
        ("method", *scores),
        tuple(lines),
    )


def domain_rows(comparison: Comparison, column: Column, domains: Sequence[str]) -> dict[str, dict[str, Score | None]]:
    """Of all examples, of the domains' mean, and of each domain: each label's score."""
    over_all = Column(column.trained_on, column.task, column.metric, False, column.name)
    of_domains = Column(column.trained_on, column.task, column.metric, True, column.name)
    cells = {label: comparison.of(label) for label in comparison.labels}
    table: dict[str, dict[str, Score | None]] = {
        "all examples": {label: label_score(of, over_all) for label, of in cells.items()}
    }
    evaluated = [
        cell.run.evaluations[column.task]
        for cell in comparison.cells
        if cell.task == column.trained_on and column.task in cell.eval_tasks
    ]
    if all(column.metric in evaluation.mean_of_domains for evaluation in evaluated):
        table["mean of domains"] = {label: label_score(of, of_domains) for label, of in cells.items()}
    for domain in domains:
        table[domain] = {label: domain_score(of, column, domain) for label, of in cells.items()}
    return table


def cell_table(comparison: Comparison) -> Frame:
    """Every finished cell's scores, as its files hold them: the numbers that all others come from."""
    lines = []
    for cell in comparison.cells:
        for task in cell.eval_tasks:
            evaluation = cell.run.evaluations[task]
            figures: list[tuple[str, int, Mapping[str, float | None], Mapping[str, tuple[float, float]]]] = [
                ("all examples", evaluation.examples, evaluation.metrics, evaluation.interval),
                ("mean of domains", evaluation.examples, evaluation.mean_of_domains, {}),
                *((name, part.examples, _metrics(part), {}) for name, part in evaluation.by_domain.items()),
            ]
            lines += [
                [
                    text(cell.label),
                    text(cell.method),
                    text(size_in_words(cell.size)),
                    whole(cell.trainable_parameters),
                    text(cell.task),
                    text(task),
                    whole(cell.seed),
                    text(of),
                    text(metric),
                    Entry(value, f"{value:.1f}", intervals.get(metric), "examples" if metric in intervals else None),
                    whole(examples),
                    whole(cell.run.result.steps),
                    decimal(cell.run.result.train_seconds),
                ]
                for of, examples, metrics, intervals in figures
                for metric, value in metrics.items()
                if value is not None
            ]
    return Frame(
        "cells",
        "Every finished cell",
        (
            "label",
            "method",
            "size",
            "trainable parameters",
            "trained on",
            "task",
            "seed",
            "of",
            "metric",
            "score",
            "examples",
            "steps",
            "seconds of training",
        ),
        rows(lines),
        "Scores in percent; an interval is the bootstrap over the cell’s own examples.",
    )


def cost_table(comparison: Comparison) -> Frame:
    """Each label's size and what its training took, mean over its cells."""
    lines = []
    for label in comparison.labels:
        cells = comparison.of(label)
        results = [cell.run.result for cell in cells]
        lines.append(
            [
                text(label, size_in_words(cells[0].size)),
                whole(cells[0].trainable_parameters),
                decimal(sum(one.steps for one in results) / len(results), 0),
                decimal(sum(one.train_seconds for one in results) / len(results)),
                whole(len(cells)),
            ]
        )
    return Frame(
        "training cost",
        "What training took",
        ("method", "trainable parameters", "optimiser steps", "seconds of training", "cells"),
        rows(lines),
        "Steps and seconds are means over a method’s cells.",
    )


def curve_table(points: Sequence[tuple[str, str, str, float, float, float, float, int]]) -> Frame:
    """What the learning curves show: label, task, by step or second, where, mean, lowest and highest, seeds."""
    return Frame(
        "learning-curves",
        "The learning curves’ points",
        ("method", "trained on", "by", "at", "mean loss", "lowest seed", "highest seed", "seeds"),
        rows(
            [
                [
                    text(label),
                    text(task),
                    text(against),
                    decimal(at),
                    decimal(mean, 4),
                    decimal(low, 4),
                    decimal(high, 4),
                    whole(seeds),
                ]
                for label, task, against, at, mean, low, high, seeds in points
            ]
        ),
    )


def left_out_table(comparison: Comparison) -> Frame:
    """What failed, is damaged, unfinished or was not started."""
    lines = [
        [
            text(one.label),
            text(one.task),
            Entry(one.seed, "–" if one.seed is None else str(one.seed)),
            text(one.state),
            text(" ".join(one.reason.split()) or "–"),
        ]
        for one in comparison.left_out
    ]
    return Frame(
        "left-out", "Cells that the numbers do without", ("method", "trained on", "seed", "state", "why"), rows(lines)
    )


def best_scores(scores: Iterable[Score | None]) -> set[int]:
    """Where the highest mean stands, as it is printed."""
    return best_rows([score.mean if score is not None else None for score in scores])


def score_entry(score: Score | None, best: bool = False) -> Entry:
    if score is None:
        return Entry(None, "–")
    return Entry(score.mean, f"{score.mean:.1f}", score.interval, score.over, best)


def size_in_words(size: Mapping[str, Any]) -> str:
    """`T=40, N=2, R=36`: what makes a method's number of parameters."""
    return ", ".join(f"{SYMBOLS.get(name, name)}={value}" for name, value in size.items())


def p_in_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _metrics(part: Part) -> dict[str, float | None]:
    return {name: value for name, value in vars(part).items() if name != "examples"}


def _score_notes(board: Scoreboard, several: bool, published: Published | None) -> list[str]:
    scores = [score for row in board.rows for score in (*row.scores, row.average) if score]
    notes = ["Means over seeds, in percent. Bold: the highest of its column" + (", of our rows." if published else ".")]
    if any(score.over == "seeds" for score in scores):
        notes.append("± is the 95 % interval over seeds (Student’s t).")
    if any(score.over == "seeds" and len(score.seeds) == 2 for score in scores):
        notes.append("With two seeds t multiplies their spread by 12.7, and with three by 4.3: two say little.")
    if any(score.over == "examples" for score in scores):
        notes.append(
            "In brackets: one seed’s 95 % interval over examples (bootstrap), which says nothing of other seeds."
        )
    if any(score.interval is None for score in scores):
        notes.append("No interval: it would need predictions, or the same seeds for all tasks.")
    if several:
        notes.append("The average is the plain mean over the tasks, as in the paper.")
    if by_domain := [column.name for column in board.columns if column.mean_of_domains]:
        notes.append(
            f"{', '.join(by_domain)}: the plain mean of the four types, the paper’s form; the mean over all examples "
            "is under “By domain”."
        )
    if published:
        notes.append(f"Published rows: {'; '.join(published.notes) or 'the same base, training data and examples'}.")
    return notes
