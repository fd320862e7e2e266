"""What a page is made of: sections of tables and pictures, and the figures' files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ptmoe.files import replaced
from ptmoe.report.figures import Style, drawing, inline_svg
from ptmoe.report.table import Table, file_name

PNG_DPI = 200


class Picture(NamedTuple):
    """A figure as SVG of both colour modes; `alt` says what it shows to those who do not see it."""

    title: str
    note: str
    alt: str
    svg: str


@dataclass
class Section:
    """A part of a page under a heading; its tables stand where their `place` says, the pictures after the first."""

    heading: str
    explanation: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


@dataclass
class Gallery:
    """Draws the figures of a page and writes each, in light colours, as PNG and SVG."""

    folder: Path  # for the files
    looks: Mapping[str, Style]  # of the labels
    names: set[str] = field(default_factory=set)  # of the files so far

    def picture(
        self, title: str, draw: Callable[..., Any], *data: Any, alt: Mapping[str, str], note: str = ""
    ) -> Picture:
        """`draw(*data)`; `alt` has what is to be said of each thing that it shows."""
        name = file_name(title, self.names)
        self.names.add(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with drawing():
            figure = draw(*data)
            svg = inline_svg(figure, name, self.looks.values())
            figure.set_layout_engine("none")  # laid out already, which takes longer than drawing
            with replaced(self.folder / f"{name}.svg") as part:
                figure.savefig(part, format="svg", metadata={"Date": None})
            with replaced(self.folder / f"{name}.png") as part:
                figure.savefig(part, format="png", dpi=PNG_DPI)
        return Picture(title, note, "; ".join(f"{what}: {said}" for what, said in alt.items()), svg)
