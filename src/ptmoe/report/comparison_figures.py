"""The figures of a comparison's report: each function takes its labels' results and returns a `Figure`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ptmoe.errors import PtmoeError
from ptmoe.report.comparison import Cell, Comparison
from ptmoe.report.figures import (
    FONT_SIZE,
    LIGHT,
    LONGEST_DOMAIN,
    MARKERS,
    Theme,
    one_plot,
    plain,
    put_legend,
)
from ptmoe.report.frame import short_count
from ptmoe.report.results import Row, Score
from ptmoe.report.table import metric_name

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter
    from matplotlib.transforms import Bbox
except ModuleNotFoundError:
    raise PtmoeError("figures need matplotlib: pip install 'ptmoe[report]'") from None

MOST_POINTS = 200  # of a curve: as many as can be told apart
OTHER_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True)
class Style:
    """How a label looks in every figure."""

    color: str
    marker: str


@dataclass(frozen=True)
class Curve:
    """A label's learning curve: the mean loss over seeds, and the lowest and highest of them, `at` steps or seconds."""

    label: str
    at: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seeds: int


@dataclass(frozen=True)
class Mark:
    """A label's point, and the ends of the line that is drawn through it."""

    label: str
    point: tuple[float, float]
    line: Sequence[tuple[float, float]]


def styles(comparison: Comparison, theme: Theme = LIGHT) -> dict[str, Style]:
    """Each label's: its method's colour, from light to dark over the sizes of one method.

    Methods that the theme has no colour for share the circle of hues.
    """
    methods = {cell.label: cell.method for cell in comparison.cells}
    others = [method for method in dict.fromkeys(methods.values()) if method not in theme.methods]
    hues = {method: _hue(place / len(others), theme) for place, method in enumerate(others)}
    styles: dict[str, Style] = {}
    for label, method in methods.items():
        alike = [other for other, of in methods.items() if of == method]
        turn = alike.index(label)
        color = to_hex(hues.get(method, theme.method(method)))
        if len(alike) > 1:
            # From a little towards the surface to far towards the ink: all of them stand out.
            place = -0.2 + 0.85 * turn / (len(alike) - 1)
            color = _mixed(color, theme.ink if place > 0 else theme.surface, abs(place))
        other = OTHER_MARKERS[(turn if len(alike) > 1 else len(styles)) % len(OTHER_MARKERS)]
        styles[label] = Style(color, MARKERS.get(method, other) if len(alike) == 1 else other)
    return styles


def score_by_parameters(rows: Sequence[Row], metric: str, looks: Mapping[str, Style], theme: Theme = LIGHT) -> Figure:
    """Average score against trainable parameters, on a logarithmic axis, with 95 % intervals.

    The dashed line joins the labels that none beats with as few parameters or fewer. What trains nothing has no place
    on the axis and is a line across.

    Raises:
        PtmoeError: no row has an average.
    """
    scored = [(row, row.average) for row in rows if row.average is not None]
    if not scored:
        raise PtmoeError(f"no label has an average {metric}: each lacks a task")
    figure, axes = one_plot(theme, height=3.6)
    trained = [(row, score) for row, score in scored if row.trainable_parameters]
    axes.set_xscale("log")
    _parameter_axis(axes, [row.trainable_parameters for row, _ in trained] or [1])
    for row, score in trained:
        style = looks[row.label]
        axes.errorbar(
            row.trainable_parameters,
            score.mean,
            yerr=_around(score),
            fmt=style.marker,
            color=style.color,
            markersize=7,
            elinewidth=1.4,
            capsize=0,
        )
    front = _front([(row.trainable_parameters, score.mean) for row, score in trained])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=theme.ink, alpha=0.35, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for row, score in scored:
        if not row.trainable_parameters:
            axes.axhline(score.mean, color=looks[row.label].color, linewidth=1.4, linestyle=(0, (1, 1.5)))
    low, high = axes.get_ylim()
    room = max(0.08 * (high - low), 0.5)
    axes.set_ylim(max(low - room, min(0.0, low)), high + room)
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel(f"{metric_name(metric)}, %")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    left = axes.get_xlim()[0]
    right = axes.get_xlim()[1]
    marks = [
        Mark(
            row.label,
            (row.trainable_parameters or left, score.mean),
            # What a name must not cover: the interval, or the line across.
            [(row.trainable_parameters, end) for end in shown_interval(score.interval or (score.mean, score.mean))]
            if row.trainable_parameters
            else [(left, score.mean), (right, score.mean)],
        )
        for row, score in scored
    ]
    _place_labels(figure, axes, marks, looks, theme)
    return figure


def learning_curves(
    curves: Sequence[Curve], against: Literal["step", "seconds"], looks: Mapping[str, Style], theme: Theme = LIGHT
) -> Figure:
    """Each label's mean training loss over its seeds; the band goes from the lowest seed to the highest."""
    figure, axes = one_plot(theme, height=3.1)
    for curve in curves:
        style = looks[curve.label]
        axes.plot(
            curve.at,
            curve.mean,
            label=plain(curve.label),
            color=style.color,
            marker=style.marker,
            markersize=4,
            markevery=max(1, len(curve.at) // 6),
            linewidth=1.8,
        )
        if curve.seeds > 1:
            axes.fill_between(curve.at, curve.low, curve.high, color=style.color, alpha=0.18, linewidth=0)
    axes.set_xlabel("optimiser step" if against == "step" else "seconds of training")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    put_legend(axes, theme)
    return figure


def curve_of(label: str, cells: Sequence[Cell], against: Literal["step", "seconds"]) -> Curve | None:
    """A label's curve over its seeds, at the steps that all of them logged; None where there are none.

    A step's second is the mean of the seconds at which the seeds reached it.
    """
    logged = [
        {log.step: (log.seconds, log.loss) for log in cell.run.logs if log.loss is not None and math.isfinite(log.loss)}
        for cell in cells
    ]
    logged = [points for points in logged if points]
    if not logged:
        return None
    steps = sorted(step for step in set.intersection(*map(set, logged)) if step is not None)
    if against == "seconds":
        steps = [step for step in steps if all(points[step][0] is not None for points in logged)]
    if not steps:
        return None
    if len(steps) > MOST_POINTS:
        steps = [steps[place] for place in np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)]
    values = np.array([[points[step] for step in steps] for points in logged], dtype=float)  # (seeds, steps, 2)
    seconds, losses = values[:, :, 0], values[:, :, 1]
    at = seconds.mean(0) if against == "seconds" else np.array(steps, dtype=float)
    return Curve(label, at, losses.mean(0), losses.min(0), losses.max(0), len(logged))


def scores_by_domain(
    scores: Mapping[str, Mapping[str, Score | None]],
    metric: str,
    looks: Mapping[str, Style],
    theme: Theme = LIGHT,
    overall: int = 1,
) -> Figure:
    """A point for each label in each domain, with its 95 % interval.

    Args:
        scores: of each row of the figure, of each label; the first `overall` rows are over all domains.
        metric: of the scores.
        looks: of the labels.
        theme: the colours.
        overall: rows that a line parts from the others.
    """
    names = list(dict.fromkeys(label for row in scores.values() for label in row))
    pitch = 0.17 if len(names) < 6 else 0.13  # inches from one label's point to the next
    figure, axes = one_plot(theme, height=0.95 + len(scores) * (pitch * len(names) + 0.16) + 0.2 * len(names) / 2)
    share = pitch / (pitch * len(names) + 0.16)
    for turn, label in enumerate(names):
        style = looks[label]
        offset = (turn - (len(names) - 1) / 2) * share
        found = [(place + offset, score) for place, row in enumerate(scores.values()) if (score := row.get(label))]
        for place, score in found:
            if score.interval:
                low, high = shown_interval(score.interval)
                axes.plot([low, high], [place, place], color=style.color, linewidth=1.4, alpha=0.55, zorder=2)
        axes.plot(
            [score.mean for _, score in found],
            [place for place, _ in found],
            label=plain(label),
            color=style.color,
            marker=style.marker,
            markersize=5.5,
            linestyle="none",
            clip_on=False,
            zorder=3,
        )
    for edge in range(1, len(scores)):
        heavy = edge == overall
        axes.axhline(edge - 0.5, color=theme.ink if heavy else theme.faint, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(scores)), [plain(name, LONGEST_DOMAIN) for name in scores])
    for label_text in axes.get_yticklabels()[:overall]:
        label_text.set_fontweight("bold")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel(f"{metric_name(metric)}, %")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)
    put_legend(axes, theme)
    return figure


def shown_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The part of an interval that scores can be in: few seeds make it reach beyond."""
    low, high = interval
    return max(0.0, low), min(100.0, high)


def _hue(turn: float, theme: Theme) -> str:
    """A colour of the circle that stands out on the theme's surface."""
    bright = sum(to_rgb(theme.surface)) > 1.5
    return to_hex(hls_to_rgb((0.05 + turn) % 1, 0.34 if bright else 0.72, 0.55))


def _mixed(color: str, towards: str, share: float) -> str:
    (red, green, blue), (to_red, to_green, to_blue) = to_rgb(color), to_rgb(towards)
    return to_hex((red + share * (to_red - red), green + share * (to_green - green), blue + share * (to_blue - blue)))


def _around(score: Score) -> list[list[float]] | None:
    if score.interval is None:
        return None
    low, high = shown_interval(score.interval)
    return [[max(0.0, score.mean - low)], [max(0.0, high - score.mean)]]


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points above all that have as little or less on the first axis, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _parameter_axis(axes: Axes, counts: Sequence[int]) -> None:
    low, high = min(counts), max(counts)
    room = max(1.5, (high / low) ** 0.16)
    axes.set_xlim(low / room, high * room)
    decades = math.log10(high * room**2 / low)
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _place_labels(figure: Figure, axes: Axes, marks: Sequence[Mark], looks: Mapping[str, Style], theme: Theme) -> None:
    """Write each name beside its point, at the nearest place where it covers no other name, no point and no line.

    A name that has to stand away from its point is joined to it by a thin line.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now must not move
    scale = figure.dpi / 72
    radius = 5 * scale
    pixels = axes.transData.transform([mark.point for mark in marks])
    lines = [_box(axes.transData.transform(mark.line), 1.5 * scale) for mark in marks]
    taken = [*lines, *(_box([point], radius) for point in pixels)]
    inside = axes.get_window_extent()
    for index in np.argsort(-pixels[:, 1]):
        mark, (x, y) = marks[index], pixels[index]
        written = axes.annotate(
            plain(mark.label),
            mark.point,
            (0, 0),
            textcoords="offset points",
            fontsize=FONT_SIZE,
            color=theme.ink,
            ha="left",
            va="bottom",
            annotation_clip=False,
            zorder=5,
            bbox={"facecolor": theme.surface, "edgecolor": "none", "alpha": 0.8, "pad": 0.4},
        )
        extent = written.get_window_extent()
        box, ambiguous = _free_place(index, pixels, extent.width, extent.height, scale, taken, inside)
        taken.append(box)
        written.set_position(((box.x0 - x) / scale, (box.y0 - y) / scale))
        if ambiguous or _apart(box, x, y) > 14 * scale:
            across, up = axes.transData.inverted().transform((min(max(x, box.x0), box.x1), (box.y0 + box.y1) / 2))
            axes.annotate(
                "",
                mark.point,
                (float(across), float(up)),
                arrowprops={"arrowstyle": "-", "color": theme.ink, "alpha": 0.5, "linewidth": 0.7},
                annotation_clip=False,
            )


def _free_place(
    index: int,
    points: NDArray[np.float64],
    width: float,
    height: float,
    scale: float,
    taken: Sequence[Bbox],
    inside: Bbox,
) -> tuple[Bbox, bool]:
    """The nearest box of a size beside a point that overlaps nothing, and whether it could be taken for another's.

    Better one that no other point is as near to; else any; to the point's right where there is none.
    """
    x, y = points[index]
    free: list[Bbox] = []
    for distance in (7, 11, 16, 22, 30, 40, 52, 66, 82, 100):
        for angle in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70, 110, -110):
            right, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            left = x + right * distance * scale - (0.5 - right / 2) * width
            bottom = y + up * distance * scale - (0.5 - up / 2) * height
            box = Bbox.from_extents(left, bottom, left + width, bottom + height)
            within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
            if not within or any(box.overlaps(other) for other in taken):
                continue
            own = _apart(box, x, y)
            if all(own <= _apart(box, *point) for place, point in enumerate(points) if place != index):
                return box, False
            free.append(box)
    return (free[0], True) if free else (Bbox.from_bounds(x + 7 * scale, y - height / 2, width, height), True)


def _apart(box: Bbox, x: float, y: float) -> float:
    """How far a point is from a box."""
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _box(points: Sequence[Sequence[float]] | NDArray[np.float64], around: float) -> Bbox:
    (left, bottom), (right, top) = np.min(points, axis=0), np.max(points, axis=0)
    return Bbox.from_extents(left - around, bottom - around, right + around, top + around)
