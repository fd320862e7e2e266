"""A comparison in a terminal of 80 columns: methods × tasks, or the domains of a single task, with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ptmoe.report.comparison import ALL, MEAN, Comparison, counted_states, read_comparison
from ptmoe.report.results import AVERAGE, Board, Score, boards
from ptmoe.report.table import best_rows, interval_text, metric_name, short_count
from ptmoe.report.tables import domain_scores

LONGEST_HEADER = 10
MANY_PARAMETERS = 10_000_000
MOST_COLUMNS = 6  # of scores; where there are more, and no more methods than this, they are rows
INTERVALS = {
    "seeds": "± 95 % interval over seeds (Student’s t)",
    "examples": "[ ] 95 % interval over one seed’s examples (bootstrap)",
}


def comparison_summary(comparison: Comparison | str | Path) -> RenderableType:
    """A table for each metric that ranks methods; many columns of scores become rows, so that all fits.

    Raises:
        PtmoeError: a folder that `read_comparison` refuses.
    """
    if not isinstance(comparison, Comparison):
        comparison = read_comparison(comparison)
    shown: list[RenderableType] = [_table(comparison, board) for board in boards(comparison) if board.ranks]
    if comparison.left_out:
        shown.append(Text(f"without {len(comparison.left_out)} cell(s): {counted_states(comparison.left_out)}"))
    return Group(*shown)


def _table(comparison: Comparison, board: Board) -> Table:
    labels, metric = comparison.labels, metric_name(board.metric)
    names = [column.name for column in board.columns] + [AVERAGE] * (len(board.columns) > 1)
    scores: dict[str, list[Score | None]] = {
        name: [board.scores.get((label, name)) for label in labels] for name in names
    }
    title = f"{metric}, %"
    seconds: dict[str, list[Text]] = {}
    if len(names) == 1:
        title, scores = f"{metric} on {names[0]}, %", {metric: scores[names[0]]}
        parts = domain_scores(comparison, board.columns[0], board.metric)
        domains = {of: [row[label] for label in labels] for of, row in parts.items() if of not in (ALL, MEAN)}
        if min(len(domains), len(labels)) < MOST_COLUMNS:
            scores |= domains
        took = {label: [cell.run.result.train_seconds for cell in comparison.of(label)] for label in labels}
        seconds["seconds"] = [Text(f"{sum(times) / len(times):,.0f}") for times in took.values()]
    # 80 columns have room for the intervals of a few scores; of many, only the total keeps its own.
    total = metric if len(board.columns) == 1 else AVERAGE
    transposed = len(scores) > MOST_COLUMNS
    crowded = len(scores) * (len(labels) if transposed else 2) > 8
    texts = {name: _texts(column, intervals=not crowded or name == total) for name, column in scores.items()}
    over = {score.over for name, column in scores.items() for score in column if score and score.over}
    table = Table(
        title=Text(title),
        caption=Text("; ".join(INTERVALS[kind] for kind in sorted(over))),
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if not crowded else (0, 1, 0, 0),
        pad_edge=False,
    )
    counts = [comparison.of(label)[0].trainable_parameters for label in labels]
    parameters = [Text(f"{count:,}" if count < MANY_PARAMETERS else short_count(count)) for count in counts]
    if not transposed:
        table.add_column(Text("method"), overflow="fold")
        columns = {"trainable\nparameters": parameters, **texts, **seconds}
        for name, cells in columns.items():
            # Numbers are never cut; a long header is, where there is no room.
            table.add_column(_folding(name), justify="right", overflow="fold", min_width=max(map(len, cells)))
        for line in zip(map(Text, labels), *columns.values(), strict=True):
            table.add_row(*line)
        return table
    table.add_column(Text("task" if len(board.columns) > 1 else "domain"), overflow="fold")
    for label, count in zip(labels, parameters, strict=True):
        table.add_column(Text(label), justify="right", overflow="fold", min_width=min(len(count), 7))
    for name, cells in {**texts, "trainable parameters": parameters, **seconds}.items():
        table.add_row(Text(name), *cells)
    return table


def _texts(column: Sequence[Score | None], *, intervals: bool) -> list[Text]:
    best = best_rows(column)
    return [
        Text("–" if score is None else f"{score.mean:.1f} {interval_text(score) if intervals else ''}".strip(), style)
        for score, style in ((score, "bold" if row in best else "") for row, score in enumerate(column))
    ]


def _folding(name: str) -> Text:
    """A header that folds where its words do."""
    return Text(name.replace("/", "/\n").replace("_", "_\n") if len(name) > LONGEST_HEADER else name)
