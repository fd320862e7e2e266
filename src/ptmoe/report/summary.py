"""A comparison in a terminal: methods × tasks, parameters and the average, as the report's first tables have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ptmoe.report.comparison import Comparison, read_comparison
from ptmoe.report.comparison_tables import best_scores, score_entry
from ptmoe.report.frame import short_count
from ptmoe.report.results import Score, Scoreboard, scoreboards
from ptmoe.report.table import metric_name

LONGEST_HEADER = 10
MANY_PARAMETERS = 10_000_000
MOST_TASKS = 6  # beside the methods, the average among them; more stand in rows
INTERVALS = {
    "seeds": "± 95 % interval over seeds (Student’s t)",
    "examples": "[ ] 95 % interval over one seed’s examples (bootstrap)",
}


def comparison_summary(comparison: Comparison | str | Path) -> RenderableType:
    """A table for each metric that ranks methods; where tasks are many they stand in rows, so that all fits.

    Raises:
        PtmoeError: a folder that `read_comparison` refuses.
    """
    if not isinstance(comparison, Comparison):
        comparison = read_comparison(comparison)
    shown: list[RenderableType] = [_table(board) for board in scoreboards(comparison) if board.ranks]
    if comparison.left_out:
        states = [one.state for one in comparison.left_out]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        shown.append(Text(f"without {len(states)} cell(s): {counted}"))
    return Group(*shown)


def _table(board: Scoreboard) -> Table:
    tasks = [column.name for column in board.columns]
    columns = [list(column) for column in zip(*(row.scores for row in board.rows), strict=True)]
    if len(tasks) > 1:
        tasks.append("average")
        columns.append([row.average for row in board.rows])
    # 80 columns of a terminal have room for the intervals of a few; of many, only the average keeps its own.
    crowded = len(tasks) * (len(board.rows) if len(tasks) > MOST_TASKS else 2) > 8
    scores = {
        name: _cells(column, with_interval=not crowded or place == len(tasks) - 1)
        for place, (name, column) in enumerate(zip(tasks, columns, strict=True))
    }
    over = {score.over for column in columns for score in column if score and score.over}
    table = Table(
        title=Text(f"{metric_name(board.metric)}, %"),
        caption=Text("; ".join(INTERVALS[kind] for kind in sorted(over))),
        box=box.SIMPLE_HEAD,
        padding=(0, 1) if not crowded else (0, 1, 0, 0),
        pad_edge=False,
    )
    labels = [Text(row.label) for row in board.rows]
    parameters = [
        Text(f"{count:,}" if count < MANY_PARAMETERS else short_count(count))
        for count in (row.trainable_parameters for row in board.rows)
    ]
    if len(tasks) <= MOST_TASKS:
        table.add_column(Text("method"), overflow="fold")
        for name, cells in {"trainable\nparameters": parameters, **scores}.items():
            # Numbers are never cut; a long header is, where there is no room.
            table.add_column(_broken(name), justify="right", overflow="fold", min_width=max(map(len, cells)))
        for line in zip(labels, parameters, *scores.values(), strict=True):
            table.add_row(*line)
        return table
    table.add_column(Text("task"), overflow="fold")
    for label, cell in zip(labels, parameters, strict=True):
        table.add_column(label, justify="right", overflow="fold", min_width=min(len(cell), 7))
    for name, cells in {**scores, "trainable parameters": parameters}.items():
        table.add_row(Text(name), *cells)
    return table


def _cells(column: Sequence[Score | None], *, with_interval: bool) -> list[Text]:
    best = best_scores(column)
    entries = [score_entry(score) for score in column]
    return [
        Text(entry.printed if with_interval else entry.text, "bold" if index in best else "")
        for index, entry in enumerate(entries)
    ]


def _broken(name: str) -> Text:
    """A header that folds where its words do."""
    return Text(name.replace("/", "/\n").replace("_", "_\n") if len(name) > LONGEST_HEADER else name)
