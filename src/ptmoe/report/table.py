"""A table of a report: shown on its page, and written as CSV, JSON, Markdown and LaTeX.

CSV and JSON hold the numbers as they are, an interval's ends in columns of their own; Markdown and LaTeX hold what the
page prints, for a paper or an issue.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from ptmoe.report.results import Score

Value = str | int | float | Score | None


class Entry(NamedTuple):
    """A place of a table as printed, and whether it is the highest of its column."""

    text: str
    around: str = ""  # the interval
    best: bool = False


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        name: of its files, without an ending; any text, `stem` is fit for a file.
        title: what it shows.
        columns: their names; the first heads the rows.
        rows: each with a value for each column.
        note: what its numbers mean.
        sources: where each row is from, in a table whose rows are not all from one place.
        hints: for each row, printed small below its first value, on the page only.
        best: row and column numbers of the highest scores.
        formats: how the numbers of a column are printed; by default whole ones with a thousands' comma, others with one
            decimal.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    sources: Sequence[str] = ()
    hints: Sequence[str] = ()
    best: Collection[tuple[int, int]] = ()
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        return file_name(self.name, set())

    def is_prose(self, column: int) -> bool:
        """Whether a column holds words, and is aligned as they are."""
        return all(isinstance(row[column], str) for row in self.rows)

    def source(self, row: int) -> str:
        return self.sources[row] if self.sources else ""

    def entries(self, row: int) -> list[Entry]:
        """A row as printed."""
        return [
            Entry(self._text(value, self.columns[place]), interval_text(value), (row, place) in self.best)
            for place, value in enumerate(self.rows[row])
        ]

    def _text(self, value: Value, column: str) -> str:
        number = value.mean if isinstance(value, Score) else value
        if isinstance(number, str):
            return number
        if number is None or not math.isfinite(number):
            return "–"
        default = "{:,}".format if isinstance(number, int) else decimals(1)
        return str(self.formats.get(column, default)(number))

    def frame(self) -> pd.DataFrame:
        """The numbers as they are; an interval's ends and kind follow its number."""
        columns: list[tuple[str, Sequence[Any]]] = [("source", self.sources)] if self.sources else []
        for place, name in enumerate(self.columns):
            values = [row[place] for row in self.rows]
            scores: list[Any] = [value if isinstance(value, Score) else Score(value) for value in values]  # type: ignore[arg-type]
            columns.append((name, [_finite(score.mean) for score in scores]))
            if any(score.low is not None for score in scores):
                columns += [(f"{name} {end}", [getattr(score, end) for score in scores]) for end in ("low", "high")]
                columns.append((f"{name} interval over", [score.over for score in scores]))
        names = [name for name, _ in columns]
        unique = [name if names.index(name) == place else f"{name} #{place}" for place, name in enumerate(names)]
        return pd.DataFrame(
            {name: pd.Series(values, dtype=object) for name, (_, values) in zip(unique, columns, strict=True)}
        )

    def files(self) -> dict[str, tuple[str, str]]:
        """By the name of each of its files, the format and the text."""
        return {f"{self.stem}{ending}": (kind, write(self)) for ending, (kind, _, write) in FORMATS.items()}

    def downloads(self) -> list[tuple[str, str, str]]:
        """Each file's format and name, and an address that holds its contents."""
        mimes = [mime for _, mime, _ in FORMATS.values()]
        return [
            (kind, name, f"data:{mime};charset=utf-8;base64,{b64encode(text.encode()).decode()}")
            for (name, (kind, text)), mime in zip(self.files().items(), mimes, strict=True)
        ]


def interval_text(value: Value) -> str:
    """The interval as printed: ± over seeds, where it is symmetric, and its ends over examples."""
    if not isinstance(value, Score) or value.low is None or value.high is None:
        return ""
    return f"± {(value.high - value.low) / 2:.1f}" if value.over == "seeds" else f"[{value.low:.1f}, {value.high:.1f}]"


def decimals(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{round(value, digits) + 0.0:,.{digits}f}"  # the sum makes −0 a 0


def best_rows(values: Sequence[Score | None]) -> list[int]:
    """Where the highest mean is, as it is printed; nowhere if nothing is lower."""
    printed = {index: round(value.mean, 1) for index, value in enumerate(values) if value is not None}
    best = [index for index, mean in printed.items() if mean == max(printed.values())]
    return best if len(best) < len(printed) else []


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return " ".join("F1" if word == "f1" else word for word in metric.split("_"))


def file_name(title: str, used: set[str]) -> str:
    """A file's name from a title, that is not in `used`; it is added to them."""
    stem = re.sub(r"[^A-Za-z0-9.=]+", "-", title).strip("-.=").lower() or "table"
    name = stem
    while name in used:
        name = f"{stem}-{len(used)}"
    used.add(name)
    return name


def short_count(value: float) -> str:
    """A number of parameters with two or three digits and a thousands' letter: 80.7k, 1.24B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def to_csv(table: Table) -> str:
    frame = table.frame().map(_inert).rename(columns=_inert)
    return str(frame.to_csv(index=False, lineterminator="\r\n"))


def to_json(table: Table) -> str:
    contents = {"title": table.title, "note": table.note, "rows": table.frame().to_dict("records")}
    return json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(table: Table) -> str:
    rows = [list(map(_markdown, table.columns)), *_printed(table, _markdown, "**{}**")]
    if table.sources:
        rows = [[_markdown(source), *row] for source, row in zip(["source", *table.sources], rows, strict=True)]
    rows.insert(1, ["---"] * (1 + bool(table.sources)) + ["---:"] * (len(table.columns) - 1))
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"**{_markdown(table.title)}**\n\n{body}\n" + (f"\n{_markdown(table.note)}\n" if table.note else "")


def to_latex(table: Table) -> str:
    caption, width = _latex(f"{table.title}. {table.note}".strip()), len(table.columns)
    lines = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_latex, table.columns)) + r" \\", r"\midrule"]
    for row, entries in enumerate(_printed(table, _latex, r"\textbf{{{}}}")):
        if row and table.source(row) != table.source(row - 1):
            source = _latex(table.source(row))
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{source}}}}} \\"]
        lines.append(" & ".join(entries) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _printed(table: Table, escaped: Callable[[str], str], bold: str) -> list[list[str]]:
    return [
        [
            f"{bold.format(escaped(entry.text)) if entry.best else escaped(entry.text)} {escaped(entry.around)}".strip()
            for entry in table.entries(row)
        ]
        for row in range(len(table.rows))
    ]


FORMATS: dict[str, tuple[str, str, Callable[[Table], str]]] = {
    ".csv": ("CSV", "text/csv", to_csv),
    ".json": ("JSON", "application/json", to_json),
    ".md": ("Markdown", "text/markdown", to_markdown),
    ".tex": ("LaTeX", "application/x-tex", to_latex),
}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inert(value: Any) -> Any:
    """A spreadsheet takes a text that begins so for a formula; a quotation mark before it makes it text again."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _markdown(value: str) -> str:
    line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)


_MARKS = "\\ textbackslash ~ textasciitilde ^ textasciicircum < textless > textgreater | textbar … dots".split()
_LATEX = {mark: rf"\{name}{{}}" for mark, name in zip(_MARKS[::2], _MARKS[1::2], strict=True)}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"} | {"±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "–": "--"}
_LATEX |= {"“": "``", "”": "''", "’": "'"}


def _latex(value: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(value.split()))
