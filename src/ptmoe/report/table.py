"""A table of a report: shown on its page, and written as CSV, JSON, Markdown and LaTeX.

CSV and JSON hold the numbers as they are, an interval's ends in columns of their own; Markdown and LaTeX hold what the
page prints, for a paper or an issue.
"""

import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Literal, NamedTuple

import pandas as pd

from ptmoe.files import printable
from ptmoe.report.results import Score


class Entry(NamedTuple):
    """A place of a table as printed, and whether it stands out."""

    text: str
    interval: str = ""
    bold: bool = False


@dataclass
class Table:
    name: str  # of its files, without an ending; any text, `files` makes it fit for them
    title: str
    frame: pd.DataFrame  # texts, numbers, `Score`s and None; the first column heads the rows
    note: str = ""  # what its numbers mean
    sources: Sequence[str] = ()  # where each row is from, in a table whose rows are not all from one place
    hints: Sequence[str] = ()  # for each row, printed small below its first value, on the page only
    ranked: bool = False  # whether the highest `Score` of each column is bold
    # How numbers of a column are printed; by default whole ones with a thousands' comma, but for seeds, others with one
    # decimal.
    formats: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    place: Literal["page", "folded", "download"] = "page"  # on the page as it is, to be opened there, or not at all

    @property
    def columns(self) -> list[str]:
        return list(self.frame.columns)

    @property
    def prose(self) -> list[bool]:
        """Whether each column holds words, and is aligned as they are."""
        return [all(isinstance(value, str) for value in self.frame[name]) for name in self.columns]

    def rows(self) -> list[list[Entry]]:
        """As printed."""
        columns = []
        for name, values in self.frame.astype(object).items():
            best = best_rows([value if isinstance(value, Score) else None for value in values]) if self.ranked else []
            columns.append(
                [
                    Entry(self._text(value, name), value.interval if isinstance(value, Score) else "", row in best)
                    for row, value in enumerate(values)
                ]
            )
        return [list(row) for row in zip(*columns, strict=True)]

    def _text(self, value: Any, column: str) -> str:
        number = _plain(value.mean if isinstance(value, Score) else value)
        if number is None or isinstance(number, (str, bool)) or column == "seed":  # to Python, True is a whole number
            return "–" if number is None else printable(str(number))
        default = "{:,}".format if isinstance(number, int) else decimals(1)
        return str(self.formats.get(column, default)(number))

    def numbers(self) -> pd.DataFrame:
        """The values as they are; an interval's ends and kind follow its number."""
        columns = {"source": list(self.sources)} if self.sources else {}
        for name, values in self.frame.astype(object).items():
            scores = [value if isinstance(value, Score) else Score(value) for value in values]
            columns[name] = [_plain(score.mean) for score in scores]
            if any(score.low is not None for score in scores):
                for end, what in (("low", "low"), ("high", "high"), ("interval over", "over")):
                    unique = f"{name} {end}" + " (interval)" * (f"{name} {end}" in self.columns)
                    columns[unique] = [getattr(score, what) for score in scores]
        return pd.DataFrame(columns, dtype=object)

    def files(self) -> dict[str, tuple[str, str, str]]:
        """By the name of each of its files: the format, the text, and an address that holds it."""
        found = {}
        for ending, (kind, mime, write) in FORMATS.items():
            text = write(self)
            address = f"data:{mime};charset=utf-8;base64,{b64encode(text.encode()).decode()}"
            found[f"{file_name(self.name)}{ending}"] = (kind, text, address)
        return found


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


def file_name(title: str, used: Collection[str] = ()) -> str:
    """A file's name from a title, that is not in `used`."""
    stem = re.sub(r"[^A-Za-z0-9.=]+", "-", title).strip("-.=").lower()[:100] or "table"
    return next(name for name in chain([stem], (f"{stem}-{number}" for number in count(2))) if name not in used)


def short_count(value: float) -> str:
    """A number of parameters with two or three digits and a thousands' letter: 80.7k, 1.24B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def to_csv(table: Table) -> str:
    frame = table.numbers().map(_inert).rename(columns=_inert)
    return str(frame.to_csv(index=False, lineterminator="\r\n"))


def to_json(table: Table) -> str:
    contents = {"title": table.title, "note": table.note, "rows": table.numbers().to_dict("records")}
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
    for row, cells in enumerate(_printed(table, _latex, r"\textbf{{{}}}")):
        if row and table.sources and table.sources[row] != table.sources[row - 1]:
            source = _latex(table.sources[row])
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{source}}}}} \\"]
        first, *others = cells  # a bracket or a star would be an argument of the command before it
        lines.append(" & ".join([f"{{}}{first}" if first.startswith(("[", "*")) else first, *others]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _printed(table: Table, escaped: Callable[[str], str], bold: str) -> list[list[str]]:
    def text(entry: Entry) -> str:
        shown = escaped(entry.text)
        return f"{bold.format(shown) if entry.bold else shown} {escaped(entry.interval)}".strip()

    return [[text(entry) for entry in row] for row in table.rows()]


FORMATS: dict[str, tuple[str, str, Callable[[Table], str]]] = {
    ".csv": ("CSV", "text/csv", to_csv),
    ".json": ("JSON", "application/json", to_json),
    ".md": ("Markdown", "text/markdown", to_markdown),
    ".tex": ("LaTeX", "application/x-tex", to_latex),
}


def _plain(value: Any) -> Any:
    """JSON has no NaN, and a table prints none."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inert(value: Any) -> Any:
    """A spreadsheet takes a text that begins so for a formula; a quotation mark before it makes it text again."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _markdown(value: str) -> str:
    line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)


_MARKS = r"\ \textbackslash{} ~ \textasciitilde{} ^ \textasciicircum{} < \textless{} > \textgreater{}".split()
_MARKS += (
    r"| \textbar{} & \& % \% $ \$ # \# _ \_ { \{ } \} ± $\pm$ × $\times$ − $-$ – -- … \dots{} “ `` ” '' ’ '".split()
)
_LATEX = str.maketrans(dict(zip(_MARKS[::2], _MARKS[1::2], strict=True)))


def _latex(value: str) -> str:
    return " ".join(value.split()).translate(_LATEX)
