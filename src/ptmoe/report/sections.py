"""The parts of a report's page: what each table and figure holds, and what it says in words."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from ptmoe.report import figures
from ptmoe.report.comparison import AVERAGE, MEAN, Comparison, paper, size_text
from ptmoe.report.costs import cost_sections, rate_sections
from ptmoe.report.gallery import Gallery, Section
from ptmoe.report.results import Board, part_scores
from ptmoe.report.routing import routing_sections
from ptmoe.report.table import Table, metric_name

OURS = "this comparison"
Row = dict[str, Any]


def trained_text(count: int) -> str:
    return f"{count:,} trainable parameters" if count else "nothing trained"


def sections(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for."""
    for board in found:
        tables = [score_table(comparison, board)]
        if board.tests or board.test_notes:
            tables.append(paired_table(board))
        yield Section(_board_title(board), tables=tables)
    yield from _parameters(comparison, found, gallery)
    yield from cost_sections(comparison)
    yield from rate_sections(comparison)
    yield from _domains(comparison, found, gallery)
    yield from _curves(comparison, gallery)
    yield from routing_sections(comparison, gallery)
    if comparison.left_out:
        rows = [[*cell[:-1], " ".join(cell.reason.split()) or "–"] for cell in comparison.left_out]
        frame = pd.DataFrame(rows, columns=["method", "trained on", "seed", "state", "why"], dtype=object)
        yield Section(
            "Cells that are left out",
            "Failed, damaged, unfinished, or not started of all methods, tasks and seeds that anything is known of.",
            [Table("left-out", "Cells that the numbers do without", frame)],
        )
    cells = comparison.scores.drop(columns="ranks", errors="ignore")
    note = "Scores in percent; low and high are of the 95 % interval, the bootstrap over the cell’s own examples."
    yield Section(
        "Every cell",
        "What all numbers above come from: each finished cell’s scores as its files hold them, and what training took.",
        [Table("cells", "Every finished cell", cells, note, place="download")],
    )


def _board_title(board: Board, what: str = "") -> str:
    """The metric, and the task where it is a single one; otherwise `what` before it."""
    metric = metric_name(board.metric)
    return f"{metric} on {board.columns[0].name}" if len(board.columns) == 1 else f"{what} {metric}".strip()


def score_table(comparison: Comparison, board: Board) -> Table:
    """The paper's form: rows are methods, columns parameters, tasks and their average; then the paper's own rows."""
    rows: list[Row] = []
    for label in comparison.labels:
        count = comparison.of(label)[0].trainable_parameters
        scores = {name: board.scores.get((label, name)) for name in board.names}
        seeds = {seed for score in scores.values() if score for seed in score.seeds}
        rows.append({"method": label, "trainable parameters": count, **scores, "seeds": len(seeds) if count else None})
    published, differences = published_rows(comparison, board)
    hints = [size_text(comparison.of(label)[0].size) for label in comparison.labels] + [""] * len(published)
    return Table(
        f"scores {board.metric}",
        f"{metric_name(board.metric)}, %",
        pd.DataFrame([*rows, *published], dtype=object),
        " ".join(_score_notes(board, differences if published else None)),
        sources=[OURS] * len(rows) + [_source()] * len(published) if published else (),
        hints=hints,
        ranked=True,
    )


def _score_notes(board: Board, differences: Sequence[str] | None) -> list[str]:
    scores = board.scores.values()
    over_seeds = [len(score.seeds) for score in scores if score.over == "seeds"]
    means = ", ".join(column.name for column in board.columns if column.of == MEAN)
    published = "; ".join(differences or []) or "the same base, training data and examples"
    bold = "Bold: the highest of its column" + ("." if differences is None else ", of our rows.")
    examples = "one seed’s 95 % interval over examples (bootstrap), which says nothing of other seeds."
    types = "the plain mean of the four types, the paper’s form; the mean over all examples is under “By domain”."
    notes = {
        f"Means over seeds, in percent. {bold}": True,
        "± is the 95 % interval over seeds (Student’s t).": over_seeds,
        "With two seeds t multiplies their spread by 12.7, and with three by 4.3: two say little.": 2 in over_seeds,
        f"In brackets: {examples}": any(score.over == "examples" for score in scores),
        "No interval: it would need predictions, or the same seeds for all tasks.": any(s.low is None for s in scores),
        "The average is the plain mean over the tasks, as in the paper.": len(board.columns) > 1,
        f"{means}: {types}": means,
        f"Published rows: {published}.": differences is not None,
    }
    return [note for note, applies in notes.items() if applies]


def _source() -> str:
    return f"published: {paper()['source']}, {paper()['base']}"


def published_rows(comparison: Comparison, board: Board) -> tuple[list[Row], list[str]]:
    """The paper's rows for a table of ours, and in what its figures differ from ours; no rows where it has none of the
    tasks. A row has a score in percent for each column, None where the paper has none, and the plain mean of them."""
    facts = paper()
    table = facts["tables"].get(board.metric, {"rows": {"FT": {"scores": {}}}})
    shared = [column for column in board.columns if column.task in table["rows"]["FT"]["scores"]]
    if not shared:
        return [], []
    rows = []
    for method, row in table["rows"].items():
        scores = {column.name: row["scores"].get(column.task) for column in board.columns}
        average = None if None in scores.values() else sum(scores.values()) / len(scores)
        last = {AVERAGE: average} if len(scores) > 1 else {}
        rows.append({"method": method, "trainable parameters": facts["parameters"][method], **scores, **last})
    differences = []
    if not all(base.rstrip("/").endswith(facts["base"]) for base in comparison.bases):
        here = ", ".join(comparison.bases)
        differences.append(f"another base: the paper tuned {facts['base']}, here it is {here}")
    if trained := sorted({column.trained_on for column in shared} - {table["trained_on"]}):
        here = ", ".join(trained)
        differences.append(f"other training data: the paper trained on {table['trained_on']}, here on {here}")
    others = []
    for task in dict.fromkeys(column.task for column in shared if column.task in facts["examples"]):
        evaluations = (cell.run.evaluations.get(task) for cell in comparison.cells)
        ours = sorted({evaluation.examples for evaluation in evaluations if evaluation})
        if ours != [facts["examples"][task]]:
            others.append(f"{task} has {facts['examples'][task]:,} there, {' or '.join(f'{n:,}' for n in ours)} here")
    return rows, differences + ([f"other test examples: {'; '.join(others)}"] if others else [])


def paired_table(board: Board) -> Table:
    """A row for each task, then the average: the difference, its interval, p and Holm's p."""
    (first, second), several = board.ranking[:2], len(board.tests) > 1
    corrected = "; p (Holm) is corrected for the number of tasks" if several else ""
    note = (
        f"{first} less {second}, in points of {metric_name(board.metric)}, each example’s score the mean over the "
        "seeds that both have. Interval: 95 %, percentile bootstrap over examples. p: two-sided sign-flip permutation "
        f"test on the same examples, 10,000 draws{corrected}. Both take the trained seeds as given: they speak of "
        "these adapters on other examples, and the ± above of other seeds."
    )
    frame = pd.DataFrame(board.tests, columns=["task", "difference", "p", "p (Holm)", "examples"], dtype=object)
    frame["seeds"] = [len(test.difference.seeds) for test in board.tests]
    return Table(
        f"paired {board.metric}",
        f"{first} against {second} on the same examples",
        frame if several else frame.drop(columns="p (Holm)"),
        " ".join([note, *board.test_notes]),
        formats={"difference": "{:+.1f}".format, "p": p_text, "p (Holm)": p_text},
    )


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _parameters(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    counts = {cell.label: cell.trainable_parameters for cell in comparison.cells}
    pictures = []
    for board in (board for board in found if board.ranks and len(board.ranking) > 1):
        means = {label: board.scores[label, AVERAGE].mean for label in board.ranking}
        front = figures.pareto_front({label: (counts[label], mean) for label, mean in means.items()})
        alt = {label: f"{mean:.1f} % with {trained_text(counts[label])}" for label, mean in means.items()}
        alt["on the dashed line"] = ", ".join(front) or "none"
        title = f"{_board_title(board, 'average')} by trainable parameters"
        pictures.append(gallery.picture(title, figures.score_by_parameters, board, counts, gallery.looks, alt=alt))
    if pictures:
        yield Section(
            "Score against trainable parameters",
            "The average over tasks with its 95 % interval. The dashed line joins the methods that none beats with as "
            "few parameters or fewer; a dotted line is a method that trains nothing.",
            pictures=pictures,
        )


def _domains(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    pictures, tables = [], []
    for board, column in ((each, column) for each in found if each.ranks for column in each.columns):
        scores = part_scores(comparison, column, board.metric)
        if len(scores) < 4:  # all examples, the mean of domains, and a single domain
            continue
        title = f"{metric_name(board.metric)} on {column.name} by domain"
        rows: list[Row] = [
            {"method": label, **{of: row.get(label) for of, row in scores.items()}} for label in comparison.labels
        ]
        known = paper()["by_domain"].get(column.task, {}) if board.metric == "accuracy" else {}
        for method, parts in known.items():
            rows.append({"method": method, MEAN: sum(parts.values()) / len(parts), **parts})
        sources = [OURS] * len(comparison.labels) + [_source()] * len(known) if known else ()
        frame = pd.DataFrame(rows, columns=["method", *scores], dtype=object)
        name = f"domains {board.metric} {column.name}"
        tables.append(Table(name, f"{title}, %", frame, sources=sources, ranked=True, place="folded"))
        drawn = {of: row for of, row in scores.items() if of != MEAN or column.of == MEAN}  # the table has it
        alt = {of: ", ".join(f"{label} {score.mean:.1f}" for label, score in row.items()) for of, row in drawn.items()}
        data = (drawn, board.metric, 1 + (MEAN in drawn), gallery.looks)
        if sum(map(len, drawn.values())) <= figures.MOST_MARKS:
            pictures.append(gallery.picture(title, figures.scores_by_domain, *data, alt=alt))
    if tables:
        explanation = "Means over seeds. The lines are 95 % intervals; a single seed has none within a domain."
        if len(pictures) < len(tables):
            explanation += f" More than {figures.MOST_MARKS:,} scores are in a table and not in a figure."
        yield Section("By domain", explanation, tables, pictures)


def _curves(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    points = pd.concat([figures.curve_points(comparison, "step"), figures.curve_points(comparison, "seconds")])
    pictures = []
    for (task, by), part in points.groupby(["trained on", "by"], sort=False):
        ends = {label: curve["mean loss"].iloc[[0, -1]] for label, curve in part.groupby("method", sort=False)}
        alt = {label: "loss from {:.3f} to {:.3f}".format(*values) for label, values in ends.items()}
        title = f"loss by {'step' if by == 'step' else 'second'} on {task}"
        pictures.append(gallery.picture(title, figures.learning_curves, part, gallery.looks, alt=alt))
    if pictures:
        yield Section(
            "Learning curves",
            "Cross-entropy on the supervised tokens, in nats, as training logged it: the mean over seeds, and a band "
            "from the lowest seed to the highest. A second is the mean of the seeds’ at the same step.",
            [Table("learning-curves", "The learning curves’ points", points, place="download")],
            pictures,
        )
