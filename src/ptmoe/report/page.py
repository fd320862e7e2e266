"""What every report's page is made of: pictures in both colour modes, tables of facts, and the template."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.report.figures import DARK, LIGHT, Theme
from ptmoe.report.frame import Frame, file_name
from ptmoe.report.runs import Run

try:
    from jinja2 import Environment, StrictUndefined, Template
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise PtmoeError("a report needs jinja2 and matplotlib: pip install 'ptmoe[report]'") from None

PNG_DPI = 200
LONGEST_PART = 11  # letters


@dataclass(frozen=True)
class Picture:
    """A figure in both colour modes, as data URIs; `alt` says what it shows to those who do not see it."""

    title: str
    note: str
    alt: str
    light: str
    dark: str


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading.

    Attributes:
        heading: of it.
        explanation: of what it shows.
        tables: shown first.
        pictures: shown next.
        folded: tables that open when asked for.
        numbers: tables that are too long to show, to download.
    """

    heading: str
    explanation: str = ""
    tables: Sequence[Frame] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Frame] = ()
    numbers: Sequence[Frame] = ()

    @property
    def anchor(self) -> str:
        return file_name(self.heading, set())

    @property
    def frames(self) -> list[Frame]:
        return [*self.tables, *self.folded, *self.numbers]


@dataclass(frozen=True)
class Facts:
    """Named values of runs: a column for each run, or one for all where they agree on everything."""

    columns: list[str]
    rows: list[tuple[str, list[str], bool]]  # name, values, whether the runs differ


@dataclass
class Gallery:
    """Draws the figures of a page and writes each, in light colours, as PNG and SVG.

    Attributes:
        folder: for the files; it is made.
        names: of the files so far.
    """

    folder: Path
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def picture(self, title: str, alt: str, draw: Callable[[Theme], Figure], note: str = "") -> Picture:
        name = file_name(title, self.names)
        light = draw(LIGHT)
        drawn = _svg(light)
        (self.folder / f"{name}.svg").write_bytes(drawn)
        light.set_layout_engine("none")  # laid out already, which takes longer than drawing
        light.savefig(self.folder / f"{name}.png", dpi=PNG_DPI)
        return Picture(title, note, alt, _data_uri(drawn), _data_uri(_svg(draw(DARK))))


@dataclass(frozen=True)
class Warned:
    """What a reader has to know before the numbers."""

    heading: str
    lines: list[str]


def write_page(
    folder: Path,
    *,
    title: str,
    subtitle: str = "",
    summary: Sequence[str],
    warnings: Sequence[Warned],
    sections: Sequence[Section],
    configuration: Facts,
    environment: Facts,
    command: str,
) -> Path:
    """Write `folder/report.html` and `folder/tables/*`; returns the page's path."""
    tables = folder / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    files_so_far: set[str] = set()
    sections = [_with_own_files(section, files_so_far) for section in sections]
    for section in sections:
        for frame in section.frames:
            frame.write(tables)
    path = folder / "report.html"
    page = _template().render(
        parts=parts,
        title=title,
        subtitle=subtitle,
        summary=summary,
        warnings=warnings,
        sections=sections,
        configuration=configuration,
        environment=environment,
        command=command,
    )
    path.write_text(page, encoding="utf-8")
    return path


def parts(name: str) -> list[str]:
    """A name in the parts that it may be broken into: after a mark, and within a word that is too long for a column."""
    return re.findall(rf"[^\W_]{{1,{LONGEST_PART}}}[\W_]*|[\W_]+", name)


def facts(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Facts:
    keys = list(dict.fromkeys(key for run in runs for key in run))
    rows = []
    for key in keys:
        values = [_written(run[key]) if key in run else "–" for run in runs]
        rows.append((key, values, len(set(values)) > 1))
    if any(differ for *_, differ in rows):
        return Facts(list(names), rows)
    return Facts(["all runs" if len(runs) > 1 else names[0]], [(key, values[:1], False) for key, values, _ in rows])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names; those of a list go by their label, name or number."""
    options: dict[str, Any] = {}
    for key, value in config.items():
        inner = value
        if isinstance(value, list) and all(isinstance(one, dict) for one in value):
            inner = {str(one.get("label", one.get("name", place))): one for place, one in enumerate(value)}
        if isinstance(inner, dict) and inner:
            options |= flat(inner, f"{prefix}{key}.")
        else:
            options[f"{prefix}{key}"] = value
    return options


def environment_facts(run: Run) -> dict[str, Any]:
    """Commit, seed, hardware and versions."""
    environment = run.environment
    return {
        "commit": environment.commit or "not a checkout",
        "seed": environment.seed if environment.seed is not None else run.config.get("seed"),
        **environment.hardware,
        **{name: version or "not installed" for name, version in environment.versions.items()},
    }


def listed(words: Iterable[str]) -> str:
    """Joined as people do: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _with_own_files(section: Section, so_far: set[str]) -> Section:
    """The same section, its tables' names made into those of files that no other table of the page has."""

    def named(frames: Sequence[Frame]) -> list[Frame]:
        return [replace(frame, name=file_name(frame.name, so_far)) for frame in frames]

    return replace(section, tables=named(section.tables), folded=named(section.folded), numbers=named(section.numbers))


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


def _svg(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "ptmoe"}):  # the same figure gives the same bytes
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("ptmoe.report").joinpath("report.html.j2").read_text(encoding="utf-8"))
