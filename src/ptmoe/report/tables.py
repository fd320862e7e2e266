"""The tables of a report: the paper's form, paired tests, domains, curves, routing, and every cell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptmoe.report.comparison import MEAN, Comparison, size_text
from ptmoe.report.published import paper, source
from ptmoe.report.results import AVERAGE, Board, Column, PairedTests, Score, score_of, score_rows
from ptmoe.report.table import Table, Value, best_rows, decimals, metric_name
from ptmoe.runs.folders import Run
from ptmoe.runs.records import EvaluationSummary, RoutingSummary

OURS = "this comparison"


@dataclass(frozen=True)
class Published:
    """Rows of the paper for a table of ours.

    Attributes:
        source: the paper and the base that it tuned.
        rows: by method, its count of parameters as printed, a score in percent for each column of the table, None where
            the paper has none, and the plain mean over the columns, None where one lacks.
        notes: in what its figures differ from ours.
    """

    source: str
    rows: dict[str, tuple[str, list[float | None], float | None]]
    notes: tuple[str, ...]


def score_table(comparison: Comparison, board: Board) -> Table:
    """The paper's form: rows are methods, columns parameters, tasks and their average."""
    several = len(board.columns) > 1
    names = [column.name for column in board.columns] + [AVERAGE] * several
    rows: list[list[Value]] = []
    hints = []
    for label in comparison.labels:
        cell = comparison.of(label)[0]
        scores = [board.scores.get((label, name)) for name in names]
        seeds = {seed for score in scores if score for seed in score.seeds}
        rows.append([label, cell.trainable_parameters, *scores, len(seeds) if cell.trainable_parameters else None])
        hints.append(size_text(cell.size))
    columns = [[board.scores.get((label, name)) for label in comparison.labels] for name in names]
    best = {(row, 2 + place) for place, scores in enumerate(columns) for row in best_rows(scores)}
    published = published_for(comparison, board)
    sources = [OURS] * len(rows)
    for method, (parameters, figures, average) in published.rows.items() if published else ():
        rows.append([method, parameters, *figures, *([average] if several else []), None])
        hints.append("")
    return Table(
        f"scores {board.metric}",
        f"{metric_name(board.metric)}, %",
        ("method", "trainable parameters", *names, "seeds"),
        rows,
        " ".join(_score_notes(board, several, published.notes if published else None)),
        sources=[*sources, *[published.source] * len(published.rows)] if published else (),
        hints=hints,
        best=best,
    )


def _score_notes(board: Board, several: bool, published: Sequence[str] | None) -> Iterator[str]:
    scores = board.scores.values()
    yield "Means over seeds, in percent. Bold: the highest of its column" + (
        "." if published is None else ", of our rows."
    )
    if any(score.over == "seeds" for score in scores):
        yield "± is the 95 % interval over seeds (Student’s t)."
    if any(score.over == "seeds" and len(score.seeds) == 2 for score in scores):
        yield "With two seeds t multiplies their spread by 12.7, and with three by 4.3: two say little."
    if any(score.over == "examples" for score in scores):
        yield "In brackets: one seed’s 95 % interval over examples (bootstrap), which says nothing of other seeds."
    if any(score.low is None for score in scores):
        yield "No interval: it would need predictions, or the same seeds for all tasks."
    if several:
        yield "The average is the plain mean over the tasks, as in the paper."
    if by_domain := [column.name for column in board.columns if column.of == MEAN]:
        yield (
            f"{', '.join(by_domain)}: the plain mean of the four types, the paper’s form; the mean over all examples "
            "is under “By domain”."
        )
    if published is not None:
        yield f"Published rows: {'; '.join(published) or 'the same base, training data and examples'}."


def paired_table(tests: PairedTests, metric: str) -> Table:
    """A row for each task, then the average: the difference, its interval, p and Holm's p."""
    several = len(tests.tasks) > 1
    corrected = "; p (Holm) is corrected for the number of tasks" if several else ""
    note = (
        f"{tests.first} less {tests.second}, in points of {metric_name(metric)}, each example’s score the mean over "
        "the seeds that both have. Interval: 95 %, percentile bootstrap over examples. p: two-sided sign-flip "
        f"permutation test on the same examples, 10,000 draws{corrected}. Both take the trained seeds as given: they "
        "speak of these adapters on other examples, and the ± above of other seeds."
    )
    return Table(
        f"paired {metric}",
        f"{tests.first} against {tests.second} on the same examples",
        ("task", "difference", "p", *(["p (Holm)"] if several else []), "examples", "seeds"),
        [
            [test.name, test.difference, test.p, *([test.p_holm] if several else []), test.examples, len(test.seeds)]
            for test in (*tests.tasks, *([tests.average] if tests.average else []))
        ],
        " ".join([note, *(f"{name}: {why}." for name, why in tests.notes)]),
        formats={"difference": "{:+.1f}".format, "p": p_text, "p (Holm)": p_text},
    )


def domain_scores(comparison: Comparison, column: Column, metric: str) -> dict[str, dict[str, Score | None]]:
    """Over all examples, as the domains' mean, and in each domain: each label's score."""
    rows = comparison.scores[comparison.scores["metric"] == metric]
    here = rows[(rows["trained on"] == column.trained_on) & (rows["task"] == column.task)]
    parts = {
        label: {of: score_rows(here[here["label"] == label], column, of) for of in here["of"].unique()}
        for label in comparison.labels
    }
    return {
        of: {label: score_of(found[of]) if len(found[of]) else None for label, found in parts.items()}
        for of in here["of"].unique()
    }


def domain_table(comparison: Comparison, column: Column, metric: str) -> Table:
    """A row for each label; over all examples, the mean of domains, and each domain; then the paper's rows."""
    scores = domain_scores(comparison, column, metric)
    known = paper()["by_domain"].get(column.task, {}) if metric == "accuracy" else {}
    rows: list[list[Value]] = [[label, *(scores[of][label] for of in scores)] for label in comparison.labels]
    for method, parts in known.items():
        figures = {MEAN: sum(parts.values()) / len(parts), **parts}
        rows.append([method, *(figures.get(of) for of in scores)])
    return Table(
        f"domains {metric} {column.name}",
        f"{metric_name(metric)} on {column.name} by domain, %",
        ("method", *scores),
        rows,
        sources=[OURS] * len(comparison.labels) + [source()] * len(known) if known else (),
        best={(row, 1 + place) for place, of in enumerate(scores) for row in best_rows(list(scores[of].values()))},
    )


def cell_table(comparison: Comparison) -> Table:
    """The long table itself: the numbers that all others come from."""
    scores = comparison.scores
    columns = [name for name in scores.columns if name not in ("ranks", "score low", "score high")]
    ends = zip(scores["score low"], scores["score high"], strict=True) if len(scores) else ()
    rows = [
        [
            Score(value, (), low, high, "examples") if name == "score" and low is not None and low == low else value
            for name, value in row.items()
        ]
        for row, (low, high) in zip(scores[columns].to_dict("records"), ends, strict=True)
    ]
    note = "Scores in percent; an interval is the bootstrap over the cell’s own examples."
    return Table("cells", "Every finished cell", columns, rows, note)


def cost_table(comparison: Comparison) -> Table:
    """Each label's size and what its training took, mean over its cells."""
    cells = {label: comparison.of(label) for label in comparison.labels}
    return Table(
        "training cost",
        "What training took",
        ("method", "trainable parameters", "optimiser steps", "seconds of training", "cells"),
        [
            [
                label,
                of[0].trainable_parameters,
                sum(cell.run.result.steps for cell in of) / len(of),
                sum(cell.run.result.train_seconds for cell in of) / len(of),
                len(of),
            ]
            for label, of in cells.items()
        ],
        "Steps and seconds are means over a method’s cells.",
        hints=[size_text(of[0].size) for of in cells.values()],
        formats={"optimiser steps": decimals(0)},
    )


def left_out_table(comparison: Comparison) -> Table:
    """What failed, is damaged, unfinished or was not started."""
    rows = [[*cell[:-1], " ".join(cell.reason.split()) or "–"] for cell in comparison.left_out]
    columns = ("method", "trained on", "seed", "state", "why")
    return Table("left-out", "Cells that the numbers do without", columns, rows)


@dataclass(frozen=True)
class Routed:
    """A run that may have routed, and what a report calls it: `title` in a figure's title, and `seed_note`, which seed
    it is, where there are several."""

    label: str
    trained_on: str
    seed: int
    run: Run
    title: str
    seed_note: str = ""

    @property
    def names(self) -> dict[str, Value]:
        return {"method": self.label, "trained on": self.trained_on, "seed": self.seed}

    @property
    def prompt_similarity(self) -> list[list[float]]:
        """Cosine of every pair of expert prompts, `(N, N)`, the same for all tasks; empty where there is none."""
        return next((routing.prompt_similarity for *_, routing in self.routings() if routing.prompt_similarity), [])

    def routings(self) -> Iterator[tuple[str, EvaluationSummary, RoutingSummary]]:
        """Of each task that it was evaluated on and routed."""
        for task, summary in self.run.evaluations.items():
            if summary.routing is not None:
                yield task, summary, summary.routing


def _listed(name: str, title: str, rows: Sequence[dict[str, Value]], note: str = "") -> Table:
    formats = dict.fromkeys(("entropy, nats", "effective experts", "mutual information, nats"), decimals(2))
    formats |= dict.fromkeys(("cosine", "mean gate", "routing confidence", "hardness"), decimals(3))
    columns = list(rows[0]) if rows else []
    return Table(name, title, columns, [list(row.values()) for row in rows], note, formats=formats)


def routing_table(runs: Sequence[Routed]) -> Table:
    """A row for each run and task: entropy, mutual information, and the largest share."""
    rows = [
        run.names
        | {
            "task": task,
            "experts": routing.num_experts,
            "entropy, nats": routing.entropy,
            "effective experts": math.exp(routing.entropy),
            "mutual information, nats": routing.mutual_information,
            "largest share, %": 100 * max(summary.overall_shares),
            "collapsed": "no" if summary.collapsed_expert is None else "yes",
        }
        for run in runs
        for task, summary, routing in run.routings()
    ]
    note = (
        "Entropy is of the experts’ use over all inputs of the task, and its exponential the number of experts that "
        "are effectively in use. Mutual information is of expert and domain: 0 where the expert says nothing about the "
        "domain. Collapsed: one of several experts takes at least 95 %."
    )
    return _listed("routing", "Routing of every seed", rows, note)


def expert_use_table(runs: Sequence[Routed]) -> Table:
    """A row for each run, task, domain and expert."""
    rows = [
        run.names | {"task": task, "domain": domain, "expert": expert, "inputs, %": 100 * share, "mean gate": gate}
        for run in runs
        for task, _, routing in run.routings()
        for domain, use in routing.use.items()
        for expert, (share, gate) in enumerate(zip(use, routing.mean_gate[domain], strict=True))
    ]
    note = "The share of a domain’s inputs whose largest gate is the expert’s, and the mean of its gate."
    return _listed("expert-use", "Expert use by domain", rows, note)


def training_table(runs: Sequence[Routed]) -> Table:
    """A row for each run, logged step and expert."""
    rows = [
        run.names
        | {"step": log.step, "expert": expert, "inputs, %": 100 * share}
        | {"routing confidence": log.routing_confidence, "hardness": log.hardness}
        for run in runs
        for log in run.run.logs
        for expert, share in enumerate(log.expert_use or ())
    ]
    note = (
        "The share of the training inputs that an expert took since the step before, the mean of the router’s largest "
        "probability, and how far the gate had hardened."
    )
    return _listed("routing-over-training", "Routing over training", rows, note)


def similarity_table(runs: Sequence[Routed]) -> Table:
    """A row for each run and pair of experts."""
    rows = [
        run.names | {"expert": first, "other expert": second, "cosine": row[second]}
        for run in runs
        for first, row in enumerate(run.prompt_similarity)
        for second in range(first)
    ]
    return _listed("prompt-similarity", "Similarity of the experts’ prompts", rows)


def nearest_table(runs: Sequence[Routed]) -> Table:
    """A row for each run, expert, virtual token and word."""
    rows = [
        run.names | {"expert": expert, "virtual token": place, "rank": rank, "word": word, "cosine": cosine}
        for run in runs
        for expert, tokens in enumerate(run.run.nearest.experts if run.run.nearest else ())
        for place, nearest in enumerate(tokens, start=1)
        for rank, (word, cosine) in enumerate(nearest, start=1)
    ]
    return _listed("nearest-words", "Nearest words of the virtual tokens", rows)


def words_table(run: Routed) -> Table | None:
    """A row for each virtual token of a run, a column for each expert; None where nobody looked for the words."""
    experts = run.run.nearest.experts if run.run.nearest else []
    if not experts:
        return None
    columns = [f"expert {expert}" for expert in range(len(experts))] if len(experts) > 1 else ["words"]
    rows: list[list[Value]] = [
        [place, *(" · ".join(f"{_visible(word)} {cosine:.2f}" for word, cosine in words) for words in tokens)]
        for place, tokens in enumerate(zip(*experts, strict=True), start=1)
    ]
    return Table(
        f"nearest words of {run.title}",
        f"Nearest words of the virtual tokens of {', '.join(filter(None, [run.title, run.seed_note]))}",
        ("virtual token", *columns),
        rows,
        "The words of the base’s vocabulary with the highest cosine to each virtual token; a space is shown as ␣.",
    )


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _visible(word: str) -> str:
    return word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"


def published_for(comparison: Comparison, board: Board) -> Published | None:
    """What the paper has for a table's tasks; None where it has none of them."""
    facts = paper()
    table = facts["tables"].get(board.metric, {"rows": {"FT": {"scores": {}}}})
    shared = [column for column in board.columns if column.task in table["rows"]["FT"]["scores"]]
    if not shared:
        return None
    rows = {}
    for method, row in table["rows"].items():
        scores = [row["scores"].get(column.task) for column in board.columns]
        average = None if None in scores else sum(scores) / len(scores)
        rows[method] = (facts["parameters"][method], scores, average)
    notes = []
    bases = comparison.bases
    if not all(base.rstrip("/").endswith(facts["base"]) for base in bases):
        notes.append(f"another base: the paper tuned {facts['base']}, here it is {', '.join(bases)}")
    trained = sorted({column.trained_on for column in shared} - {table["trained_on"]})
    if trained:
        notes.append(f"other training data: the paper trained on {table['trained_on']}, here on {', '.join(trained)}")
    notes += _other_examples(comparison, [column.task for column in shared])
    return Published(source(), rows, tuple(notes))


def _other_examples(comparison: Comparison, tasks: Sequence[str]) -> list[str]:
    published, differ = paper()["examples"], []
    for task in dict.fromkeys(tasks):
        ours = sorted(
            {cell.run.evaluations[task].examples for cell in comparison.cells if task in cell.run.evaluations}
        )
        if task in published and ours != [published[task]]:
            differ.append(f"{task} has {published[task]:,} there, {' or '.join(f'{n:,}' for n in ours)} here")
    return [f"other test examples: {'; '.join(differ)}"] if differ else []
