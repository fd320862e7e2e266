"""A comparison in a terminal of 80 columns: methods × tasks, or the domains of a single task, with parameters."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ptmoe.report.comparability import incomparable
from ptmoe.report.comparison import ALL, AVERAGE, MEAN, Comparison, counted_states, read_comparison
from ptmoe.report.results import Board, Score, boards, part_scores
from ptmoe.report.table import best_rows, metric_name, short_count

WIDTH = 80
MANY_PARAMETERS = 10_000_000
MOST_COLUMNS = 6  # of scores; where there are more, and no more methods than this, they are rows
INTERVALS = {
    "seeds": "± 95 % interval over seeds (Student’s t)",
    "examples": "[ ] 95 % interval over one seed’s examples (bootstrap)",
}


def comparison_summary(comparison: Comparison | str | Path) -> RenderableType:
    """A table for each metric that ranks methods; many columns of scores become rows, so that all fits. Below stands
    what makes cells incomparable.

    Raises:
        PtmoeError: a folder that `read_comparison` refuses.
    """
    if not isinstance(comparison, Comparison):
        comparison = read_comparison(comparison)
    shown: list[RenderableType] = [_table(comparison, board) for board in boards(comparison) if board.ranks]
    if comparison.left_out:
        shown.append(Text(f"without {len(comparison.left_out)} cell(s): {counted_states(comparison.left_out)}"))
    shown += [f"{heading} {' '.join(lines)}" for heading, lines in incomparable(comparison)]
    return Group(*shown)


def _table(comparison: Comparison, board: Board) -> Table:
    """With an interval beside every score, or, where 80 columns have no room for that, beside the total's alone."""
    metric, total = metric_name(board.metric), AVERAGE
    cells = {label: comparison.of(label) for label in comparison.labels}
    scores = {n: {label: board.scores[label, n] for label in cells if (label, n) in board.scores} for n in board.names}
    title, seconds = f"{metric}, %", {}
    if len(board.columns) == 1:
        (column,), total = board.columns, metric
        title, scores = f"{metric} on {column.name}, %", {metric: scores[column.name]}
        parts = part_scores(comparison, column, board.metric)
        domains = {
            f"{of} (domain)" if of in (metric, "seconds") else of: row
            for of, row in parts.items()
            if of not in (ALL, MEAN)
        }
        if min(len(domains), len(cells)) < MOST_COLUMNS:
            scores |= domains
        took = [[cell.run.result.train_seconds for cell in of] for of in cells.values()]
        seconds = {"seconds": [f"{sum(times) / len(times):,.0f}" for times in took]}
    as_rows = len(scores) > MOST_COLUMNS
    counts = [of[0].trainable_parameters for of in cells.values()]
    columns: dict[str, list[Any]] = {
        "trainable parameters": [short_count(n) if as_rows or n >= MANY_PARAMETERS else f"{n:,}" for n in counts]
    }
    over = {score.over for row in scores.values() for score in row.values() if score.over}

    def table(intervals: bool) -> Table:
        # Where there is no room, names fold where their words do. Numbers are never cut.
        names = {name: Text(name if intervals else re.sub("[/_]", r"\g<0>\n", name)) for name in (*scores, *cells)}
        names["trainable parameters"] = Text("trainable\nparameters")
        texts = {name: _texts(list(map(row.get, cells)), intervals or name == total) for name, row in scores.items()}
        frame = pd.DataFrame(columns | texts | seconds, index=list(cells), dtype=object)
        drawn = Table(
            title=Text(title),
            caption=Text("; ".join(INTERVALS[kind] for kind in sorted(over))),
            box=box.SIMPLE_HEAD,
            padding=(0, 1) if intervals else (0, 1, 0, 0),
            pad_edge=False,
        )
        first = ("task" if len(board.columns) > 1 else "domain") if as_rows else "method"
        drawn.add_column(first, overflow="fold", min_width=10 if as_rows else None)
        for name, column in (frame.T if as_rows else frame).items():
            least, most = max(map(len, column)), None
            if as_rows:
                least, most = 5, max(5, (WIDTH - 12) // len(cells) - 2)
            # Numbers get their width back, so room that they had to give would be missing at the table's right edge.
            whole = not as_rows and (name in columns or len(name) <= least)
            drawn.add_column(
                names.get(name, name), justify="right", overflow="fold", min_width=least, max_width=most, no_wrap=whole
            )
        for row in (frame.T if as_rows else frame).itertuples(name=None):
            drawn.add_row(names.get(row[0], row[0]), *row[1:])
        return drawn

    fits = not as_rows and Console(width=1000).measure(table(True)).maximum <= WIDTH
    return table(fits)


def _texts(column: Sequence[Score | None], intervals: bool) -> list[Text]:
    best = best_rows(column)
    return [
        Text("–" if score is None else f"{score.mean:.1f} {score.interval if intervals else ''}".strip(), style)
        for score, style in ((score, "bold" if row in best else "") for row, score in enumerate(column))
    ]
