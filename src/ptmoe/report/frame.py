"""A table of a report: shown on its page, and written as CSV, JSON, Markdown and LaTeX.

CSV and JSON hold the numbers as they are, an interval's ends in columns of their own; Markdown and LaTeX hold what the
page prints, for a paper or an issue.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Value = str | int | float | None


@dataclass(frozen=True)
class Entry:
    """What stands in a place of a table.

    Attributes:
        value: the number or text itself.
        text: it, as printed.
        interval: 95 %, around it.
        over: what the interval is over.
        best: whether it is the highest of its column.
        hint: printed small below it, on the page only.
        prose: it is words, not a number.
    """

    value: Value
    text: str
    interval: tuple[float, float] | None = None
    over: str | None = None
    best: bool = False
    hint: str = ""
    prose: bool = False

    @property
    def around(self) -> str:
        """The interval as printed: ± over seeds, where it is symmetric, and its ends over examples."""
        if self.interval is None:
            return ""
        low, high = self.interval
        return f"± {(high - low) / 2:.1f}" if self.over == "seeds" else f"[{low:.1f}, {high:.1f}]"

    @property
    def printed(self) -> str:
        return f"{self.text} {self.around}".strip()


@dataclass(frozen=True)
class Row:
    """A row; `source` says where it is from in a table whose rows are not all from one place."""

    entries: tuple[Entry, ...]
    source: str = ""


@dataclass(frozen=True)
class Download:
    """A table's file, as an address that holds its contents."""

    kind: str
    file: str
    address: str


@dataclass(frozen=True)
class Frame:
    """A table.

    Attributes:
        name: of its files, without an ending; any text, which is made fit for a file.
        title: what it shows.
        columns: their names; the first heads the rows.
        rows: each with an entry for each column.
        note: what its numbers mean.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def stem(self) -> str:
        return file_name(self.name, set())

    def is_prose(self, column: int) -> bool:
        """Whether a column holds words, and is aligned as they are."""
        return all(row.entries[column].prose for row in self.rows)

    def contents(self) -> dict[str, str]:
        """The text of each of its files, by name."""
        return {f"{self.stem}{ending}": write(self) for ending, (_, _, write) in FORMATS.items()}

    def downloads(self) -> list[Download]:
        return [
            Download(
                name,
                f"{self.stem}{ending}",
                f"data:{kind};charset=utf-8;base64,{b64encode(write(self).encode()).decode()}",
            )
            for ending, (name, kind, write) in FORMATS.items()
        ]

    def write(self, folder: Path) -> None:
        """Its files."""
        for name, text in self.contents().items():
            (folder / name).write_text(text, encoding="utf-8", newline="")

    def records(self) -> tuple[list[str], list[list[Value]]]:
        """Names and rows of plain values: an interval's ends and kind follow its number."""
        around = [any(row.entries[index].interval for row in self.rows) for index in range(len(self.columns))]
        sources = any(row.source for row in self.rows)
        header = ["source"] if sources else []
        for column, has_interval in zip(self.columns, around, strict=True):
            header += [
                column,
                *([f"{column} low", f"{column} high", f"{column} interval over"] if has_interval else []),
            ]
        rows: list[list[Value]] = []
        for row in self.rows:
            values: list[Value] = [row.source] if sources else []
            for entry, has_interval in zip(row.entries, around, strict=True):
                values.append(_finite(entry.value))
                if has_interval:
                    values += [*(entry.interval or (None, None)), entry.over]
            rows.append(values)
        return [name if header.index(name) == place else f"{name} #{place}" for place, name in enumerate(header)], rows


def text(value: str, hint: str = "") -> Entry:
    return Entry(value, value, hint=hint, prose=True)


def whole(value: int | None) -> Entry:
    return Entry(value, "–" if value is None else f"{value:,}")


def decimal(value: float | None, digits: int = 1) -> Entry:
    if value is None or not math.isfinite(value):
        return Entry(value, "–")
    return Entry(value, f"{round(value, digits) + 0.0:,.{digits}f}")  # the sum makes −0 a 0


def rows(entries: Sequence[Sequence[Entry]]) -> tuple[Row, ...]:
    return tuple(Row(tuple(row)) for row in entries)


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


def to_csv(frame: Frame) -> str:
    header, records = frame.records()
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow([_inert(name) for name in header])
    writer.writerows([[_inert(value) if isinstance(value, str) else value for value in row] for row in records])
    return written.getvalue()


def to_json(frame: Frame) -> str:
    header, records = frame.records()
    contents = {
        "title": frame.title,
        "note": frame.note,
        "rows": [dict(zip(header, record, strict=True)) for record in records],
    }
    return json.dumps(contents, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_markdown(frame: Frame) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def shown(entry: Entry) -> str:
        return f"**{_markdown(entry.text)}** {entry.around}".strip() if entry.best else _markdown(entry.printed)

    sources = any(row.source for row in frame.rows)
    lines = [
        line([*(["source"] if sources else []), *map(_markdown, frame.columns)]),
        line([*(["---"] if sources else []), "---", *["---:"] * (len(frame.columns) - 1)]),
    ]
    for row in frame.rows:
        lines.append(line([*([_markdown(row.source)] if sources else []), *map(shown, row.entries)]))
    note = f"\n{_markdown(frame.note)}\n" if frame.note else ""
    return f"**{_markdown(frame.title)}**\n\n" + "\n".join(lines) + f"\n{note}"


def to_latex(frame: Frame) -> str:
    def shown(entry: Entry) -> str:
        if not entry.best:
            return _latex(entry.printed)
        return rf"\textbf{{{_latex(entry.text)}}} {_latex(entry.around)}".strip()

    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex(' '.join(filter(None, [frame.title + '.', frame.note])))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(frame.columns) - 1)}}}",
        r"\toprule",
        f"{' & '.join(map(_latex, frame.columns))} \\\\",
        r"\midrule",
    ]
    source = frame.rows[0].source if frame.rows else ""
    for row in frame.rows:
        if row.source != source:
            source = row.source
            lines += [r"\midrule", rf"\multicolumn{{{len(frame.columns)}}}{{l}}{{\emph{{{_latex(source)}}}}} \\"]
        lines.append(f"{' & '.join(map(shown, row.entries))} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


FORMATS: dict[str, tuple[str, str, Callable[[Frame], str]]] = {
    ".csv": ("CSV", "text/csv", to_csv),
    ".json": ("JSON", "application/json", to_json),
    ".md": ("Markdown", "text/markdown", to_markdown),
    ".tex": ("LaTeX", "application/x-tex", to_latex),
}


def _finite(value: Value) -> Value:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inert(value: str) -> str:
    """A spreadsheet takes a text that begins so for a formula, and a quotation mark before it makes it text again."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _markdown(value: str) -> str:
    one_line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", one_line)


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
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
    **{character: f"\\{character}" for character in "&%$#_"},
}


def _latex(value: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(value.split()))
