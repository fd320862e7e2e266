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
    """A place of a table, as printed: its text, the interval around it, and whether it is the highest of its column."""

    text: str
    around: str = ""
    best: bool = False


class Download(NamedTuple):
    """A table's file, and an address that holds its contents."""

    kind: str
    file: str
    address: str


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
            Entry(self._text(value, column), interval_text(value), (row, place) in self.best)
            for place, (column, value) in enumerate(zip(self.columns, self.rows[row], strict=True))
        ]

    def _text(self, value: Value, column: str) -> str:
        number = value.mean if isinstance(value, Score) else value
        if isinstance(number, str):
            return number
        if number is None or not math.isfinite(number):
            return "–"
        if column in self.formats:
            return self.formats[column](number)
        return f"{number:,}" if isinstance(number, int) else f"{round(number, 1) + 0.0:,.1f}"  # the sum makes −0 a 0

    def frame(self) -> pd.DataFrame:
        """The numbers as they are; an interval's ends and kind follow its number."""
        header = ["source"] if self.sources else []
        rows: list[list[Any]] = [[source] for source in self.sources] or [[] for _ in self.rows]
        for place, column in enumerate(self.columns):
            values = [row[place] for row in self.rows]
            intervals = any(isinstance(value, Score) and value.low is not None for value in values)
            header += [column, *([f"{column} low", f"{column} high", f"{column} interval over"] if intervals else [])]
            for row, value in zip(rows, values, strict=True):
                row.append(_finite(value.mean if isinstance(value, Score) else value))
                if intervals:
                    row += value[2:] if isinstance(value, Score) else [None] * 3
        unique = [name if header.index(name) == place else f"{name} #{place}" for place, name in enumerate(header)]
        return pd.DataFrame(rows, columns=unique, dtype=object)

    def files(self) -> dict[str, str]:
        """The text of each of its files, by name."""
        return {f"{self.stem}{ending}": write(self) for ending, (_, _, write) in FORMATS.items()}

    def downloads(self) -> list[Download]:
        return [
            Download(
                kind, f"{self.stem}{ending}", f"data:{mime};charset=utf-8;base64,{b64encode(text.encode()).decode()}"
            )
            for (ending, (kind, mime, _)), text in zip(FORMATS.items(), self.files().values(), strict=True)
        ]


def interval_text(value: Value, digits: int = 1) -> str:
    """The interval as printed: ± over seeds, where it is symmetric, and its ends over examples."""
    if not isinstance(value, Score) or value.low is None or value.high is None:
        return ""
    if value.over == "seeds":
        return f"± {(value.high - value.low) / 2:.{digits}f}"
    return f"[{value.low:.{digits}f}, {value.high:.{digits}f}]"


def decimals(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{round(value, digits) + 0.0:,.{digits}f}"


def best_rows(values: Sequence[Score | None]) -> list[int]:
    """Where the highest mean is, as it is printed; nowhere if nothing is lower."""
    printed = {index: round(value.mean, 1) for index, value in enumerate(values) if value is not None}
    best = [index for index, mean in printed.items() if mean == max(printed.values())]
    return best if len(best) < len(printed) else []


def metric_name(metric: str) -> str:
    """A metric as people write it."""
    return "F1" if metric == "f1" else metric.replace("_", " ")


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
    frame = table.frame().map(_inert)
    text: str = frame.rename(columns=_inert).to_csv(index=False, lineterminator="\r\n")
    return text


def to_json(table: Table) -> str:
    contents = {"title": table.title, "note": table.note, "rows": table.frame().to_dict("records")}
    return json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(table: Table) -> str:
    sources = bool(table.sources)
    header = [*(["source"] if sources else []), *table.columns]
    lines = [[_markdown(name) for name in header], ["---"] * (1 + sources) + ["---:"] * (len(table.columns) - 1)]
    for row in range(len(table.rows)):
        line = [_markdown(table.source(row))] if sources else []
        for text, around, best in table.entries(row):
            line.append(" ".join([f"**{_markdown(text)}**" if best else _markdown(text), _markdown(around)]).strip())
        lines.append(line)
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{_markdown(table.title)}**\n\n{body}\n" + (f"\n{_markdown(table.note)}\n" if table.note else "")


def to_latex(table: Table) -> str:
    width, source = len(table.columns), table.source(0) if table.rows else ""
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(f'{table.title}. {table.note}'.strip())}}}",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        rf"{' & '.join(map(_latex, table.columns))} \\",
        r"\midrule",
    ]
    for row in range(len(table.rows)):
        if table.source(row) != source:
            source = table.source(row)
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_latex(source)}}}}} \\"]
        entries = [
            " ".join([rf"\textbf{{{_latex(text)}}}" if best else _latex(text), _latex(around)]).strip()
            for text, around, best in table.entries(row)
        ]
        lines.append(rf"{' & '.join(entries)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


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


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "−": r"$-$",
        "–": "--",
        "“": "``",
        "”": "''",
        "’": "'",
        "…": r"\dots{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
)


def _latex(value: str) -> str:
    return " ".join(value.split()).translate(_LATEX)
