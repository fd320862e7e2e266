"""The figures of a report: each function takes results and returns a `matplotlib.figure.Figure`.

They are drawn and saved within `drawing(theme)`. Every figure is as wide as a phone shows without scaling, so its text
is read there and on a desktop alike. Nothing goes through pyplot: no window system, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd

from ptmoe.report.theme import FONT_SIZE, LIGHT, Style, Theme  # isort: skip  it says how to install matplotlib

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from ptmoe.errors import PtmoeError
from ptmoe.report.comparison import Comparison
from ptmoe.report.results import AVERAGE, Board, Score
from ptmoe.report.table import metric_name, short_count
from ptmoe.runs.folders import Run
from ptmoe.runs.records import RoutingSummary

WIDTH = 4.4  # inches, at 72 points each: 317 points
LONGEST_DOMAIN = 22  # characters
MOST_POINTS = 200  # of a curve: as many as can be told apart
CURVE_COLUMNS = ("method", "trained on", "by", "at", "mean loss", "lowest seed", "highest seed", "seeds")


def score_by_parameters(
    board: Board, parameters: Mapping[str, int], looks: Mapping[str, Style], theme: Theme = LIGHT
) -> Figure:
    """Average score against trainable parameters, on a logarithmic axis, with 95 % intervals.

    The dashed line joins the labels that none beats with as few parameters or fewer. What trains nothing has no place
    on the axis and is a line across.
    """
    axes = _plot(height=3.6)
    scored = {label: board.scores[label, AVERAGE] for label in board.ranking}
    counts = [parameters[label] for label in scored if parameters[label]] or [1]
    axes.set_xscale("log")
    room = max(1.5, (max(counts) / min(counts)) ** 0.16)
    left, right = axes.set_xlim(min(counts) / room, max(counts) * room)
    decades = math.log10(right / left)
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for label, score in scored.items():
        color, marker = looks[label]
        if x := parameters[label]:
            axes.plot([x, x], score.ends, color=color, linewidth=1.4)
            axes.plot(x, score.mean, marker=marker, color=color, markersize=7, linestyle="none")
        else:
            axes.axhline(score.mean, color=color, linewidth=1.4, linestyle=(0, (1, 1.5)))
    front: list[tuple[float, float]] = []
    for x, _, mean in sorted((parameters[label], -score.mean, score.mean) for label, score in scored.items()):
        if x and (not front or mean > front[-1][1]):
            front.append((x, mean))
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=theme.ink, alpha=0.35, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    low, high = axes.get_ylim()
    margin = max(0.08 * (high - low), 0.5)
    axes.set_ylim(max(low - margin, min(0.0, low)), high + margin)
    axes.set(xlabel="trainable parameters", ylabel=f"{metric_name(board.metric)}, %")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(axis="y")
    # What a name must not cover: the interval, or the line across.
    lines = [
        [(x, end) for end in score.ends] if (x := parameters[label]) else [(left, score.mean), (right, score.mean)]
        for label, score in scored.items()
    ]
    points = [(plain(label), (parameters[label] or left, score.mean)) for label, score in scored.items()]
    _name_points(axes, points, lines, theme)
    return _figure(axes)


def _name_points(
    axes: Axes, points: Sequence[tuple[str, tuple[float, float]]], lines: Sequence[Any], theme: Theme
) -> None:
    """Write each name at the place nearest to its point where it covers no other name, no point and no line, and join
    the two by a thin line."""
    figure = _figure(axes)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured now must not move
    shapes = [*lines, *([point] for _, point in points)]
    taken = [
        Bbox.from_extents(*np.ravel([np.min(ends, 0), np.max(ends, 0)]))
        for ends in map(axes.transData.transform, shapes)
    ]
    taken = [box.padded(5 if index >= len(lines) else 2) for index, box in enumerate(taken)]
    offsets = sorted(product((9, -9, 0, 25, -25, 60, -60), range(-150, 151, 5)), key=lambda offset: math.hypot(*offset))
    inside, scale = axes.get_window_extent(), figure.dpi / 72
    arrow = {"arrowstyle": "-", "color": theme.ink, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
    for label, point in sorted(points, key=lambda named: -named[1][1]):
        width, height = Text(0, 0, label, figure=figure).get_window_extent().size
        x, y = axes.transData.transform(point)
        boxes = []
        for right, up in offsets:
            left = x + right * scale - width * (0.5 if right == 0 else right < 0)
            left = max(inside.x0 + 4 * scale, min(left, inside.x1 - width))
            boxes.append(Bbox.from_bounds(left, y + up * scale - height / 2, width, height))
        free = (box for box in boxes if not any(box.overlaps(other) for other in taken))
        box = next((box for box in free if inside.y0 <= box.y0 and box.y1 <= inside.y1), boxes[0])
        taken.append(box)
        offset = ((box.x0 - x) / scale, (box.y0 + height / 2 - y) / scale)
        axes.annotate(
            label,
            point,
            offset,
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            zorder=5,
            arrowprops=arrow,
        )


def curve_points(comparison: Comparison, against: Literal["step", "seconds"]) -> pd.DataFrame:
    """The learning curves: each label's and task's mean loss over its seeds, the lowest and the highest, at the steps
    that all seeds logged; a step's second is the mean of the seconds at which the seeds reached it."""
    logs = pd.DataFrame(
        [
            (cell.label, cell.task, against, log.step, float(getattr(log, against)), log.loss, cell.seed)
            for cell in comparison.cells
            for log in cell.run.logs
            if log.step is not None and getattr(log, against) is not None
            if log.loss is not None and math.isfinite(log.loss)
        ],
        columns=["method", "trained on", "by", "step", "at", "loss", "seed"],
    ).drop_duplicates(["method", "trained on", "step", "seed"], keep="last")
    logs["most"] = logs.groupby(["method", "trained on"])["seed"].transform("nunique")
    curves = logs.groupby(["method", "trained on", "by", "step"], sort=False)
    columns: dict[str, Any] = {"at": ("at", "mean"), "mean loss": ("loss", "mean"), "lowest seed": ("loss", "min")}
    columns |= {"highest seed": ("loss", "max"), "seeds": ("seed", "size"), "most": ("most", "first")}
    points = curves.agg(**columns).reset_index().sort_values("step", kind="stable")
    points = points[points["seeds"] == points["most"]]
    thinned = [
        curve.iloc[np.unique(np.linspace(0, len(curve) - 1, MOST_POINTS).round().astype(int))]
        for _, curve in points.groupby(["trained on", "method"], sort=False)
    ]
    return pd.concat(thinned)[list(CURVE_COLUMNS)] if thinned else pd.DataFrame(columns=CURVE_COLUMNS)


def learning_curves(points: pd.DataFrame, looks: Mapping[str, Style], theme: Theme = LIGHT) -> Figure:
    """Each label's mean training loss over its seeds, from one task's `curve_points`; the band goes from the lowest
    seed to the highest."""
    axes = _plot(height=3.1)
    for label, curve in points.groupby("method", sort=False):
        color, marker = looks[label]
        at, mean, low, high = (curve[name].to_numpy() for name in ("at", "mean loss", "lowest seed", "highest seed"))
        axes.plot(
            at, mean, label=plain(label), color=color, marker=marker, markersize=4, markevery=max(1, len(at) // 6)
        )
        if curve["seeds"].iat[0] > 1:
            axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set(
        xlabel="optimiser step" if points["by"].iat[0] == "step" else "seconds of training", ylabel="training loss"
    )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    show_legend(axes)
    return _figure(axes)


def scores_by_domain(
    scores: Mapping[str, Mapping[str, Score | None]],
    metric: str,
    looks: Mapping[str, Style],
    theme: Theme = LIGHT,
    overall: int = 1,
) -> Figure:
    """A point for each label in each domain, with its 95 % interval.

    Args:
        scores: for each row of the figure, by label; the first `overall` rows are over all domains.
        metric: of the scores.
        looks: of the labels.
        theme: the colours.
        overall: rows that a line separates from the others.
    """
    names = list(dict.fromkeys(label for row in scores.values() for label in row))
    pitch = 0.17 if len(names) < 6 else 0.13  # inches from one label's point to the next
    height = pitch * len(names) + 0.16
    axes = _plot(height=0.95 + len(scores) * height + 0.2 * len(names) / 2)
    for turn, label in enumerate(names):
        color, marker = looks[label]
        offset = (turn - (len(names) - 1) / 2) * pitch / height
        found = [(place + offset, score) for place, row in enumerate(scores.values()) if (score := row.get(label))]
        for place, score in found:
            axes.plot(score.ends, [place, place], color=color, linewidth=1.4, alpha=0.55, zorder=2)
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 5.5,
            "linestyle": "none",
            "clip_on": False,
            "zorder": 3,
        }
        means, places = [score.mean for _, score in found], [place for place, _ in found]
        axes.plot(means, places, label=plain(label), **style)
    for edge in range(1, len(scores)):
        axes.axhline(edge - 0.5, color=theme.ink if edge == overall else theme.faint, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(scores)), [plain(name, LONGEST_DOMAIN) for name in scores])
    for text in axes.get_yticklabels()[:overall]:
        text.set_fontweight("bold")
    axes.set(
        ylim=(len(scores) - 0.5, -0.5), xlim=(0, 100), xticks=range(0, 101, 25), xlabel=f"{metric_name(metric)}, %"
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    show_legend(axes)
    return _figure(axes)


def routing_heat_map(shares: Mapping[str, Sequence[float]], theme: Theme = LIGHT, of: str = "domain") -> Figure:
    """The share of each domain, or task, in percent, that each expert takes: `(N,)` for each."""
    names = [plain(domain, LONGEST_DOMAIN) or "all" for domain in shares]
    return _heat_map(list(shares.values()), names, of, [theme.low, theme.high], 0.0, "{:.0%}", theme)


def similarity_heat_map(similarity: Sequence[Sequence[float]], theme: Theme = LIGHT) -> Figure:
    """Cosine of every pair of expert prompts, `(N, N)`, on a scale from −1 to 1."""
    names = [str(index) for index in range(len(similarity))]
    return _heat_map(similarity, names, "expert", [theme.negative, theme.low, theme.high], -1.0, "{:.2f}", theme)


def routing_figures(routing: RoutingSummary, theme: Theme = LIGHT) -> dict[str, Figure]:
    """The heat maps of one task's routing, by file name: `routing`, and `prompt_similarity` where it is known."""
    figures = {"routing": routing_heat_map(routing.shares, theme)}
    if routing.prompt_similarity:
        figures["prompt_similarity"] = similarity_heat_map(routing.prompt_similarity, theme)
    return figures


def routing_over_training(run: Run, theme: Theme = LIGHT) -> Figure:
    """Which experts the training inputs were routed to, the router's confidence and the gate's hardness, by step.

    Raises:
        PtmoeError: the run logged no `expert_use`.
    """
    used = {log.step: log.expert_use for log in run.logs if log.step is not None and log.expert_use}
    if not used:
        raise PtmoeError(f"{run.folder} logged no expert_use: its method does not route, or it was not trained")
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    steps, shares = list(used), list(zip(*used.values(), strict=True))
    colors = [theme.experts[expert % len(theme.experts)] for expert in range(len(shares))]
    names = [str(expert) for expert in range(len(shares))]
    top.stackplot(steps, shares, labels=names, colors=colors, edgecolor=theme.surface, linewidth=0.8)
    top.set(ylim=(0, 1), xlim=(min(steps), max(steps) if len(steps) > 1 else min(steps) + 1))
    top.set(ylabel="share of inputs by expert", yticks=[0, 0.25, 0.5, 0.75, 1])
    top.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    show_legend(top)
    for name, key, color, dash in (
        ("confidence", "routing_confidence", 0, "-"),
        ("gate hardness", "hardness", 5, "--"),
    ):
        points = [
            (log.step, value) for log in run.logs if (value := getattr(log, key)) is not None and log.step is not None
        ]
        if points:
            bottom.plot(*zip(*points, strict=True), label=name, color=theme.experts[color], ls=dash, clip_on=False)
    bottom.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlabel="optimiser step")
    bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    bottom.grid(axis="y")
    if bottom.lines:
        show_legend(bottom)
    return figure


def _heat_map(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    of: str,
    scale: list[str],
    lowest: float,
    form: str,
    theme: Theme,
) -> Figure:
    experts, colors = len(rows[0]), LinearSegmentedColormap.from_list("", scale)
    axes = _plot(height=0.75 + 0.38 * len(rows))
    axes.imshow(rows, cmap=colors, vmin=lowest, vmax=1.0, aspect="auto")
    size = FONT_SIZE if experts <= 6 else max(4.5, FONT_SIZE * 6 / experts)
    for (y, x), value in np.ndenumerate(np.array(rows)):
        # Black and white reach the same contrast at a luminance of 0.18.
        luminance = np.dot(np.array(colors((value - lowest) / (1.0 - lowest))[:3]) ** 2.2, (0.2126, 0.7152, 0.0722))
        ink = "black" if luminance > 0.18 else "white"
        axes.text(x, y, form.format(value), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xticks(range(experts), [str(expert) for expert in range(experts)])
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="expert", ylabel=of)
    axes.spines[:].set_visible(False)
    # Thin lines between the cells.
    axes.set_xticks(np.arange(1, experts) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axes.grid(which="minor", color=theme.surface, linewidth=2)
    axes.tick_params(which="both", length=0)
    return _figure(axes)


def _plot(height: float) -> Axes:
    return Figure(figsize=(WIDTH, height), layout="constrained").subplots()


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def show_legend(axes: Axes) -> None:
    """Above the axes, so that it hides no data, in as many columns as fit; the figure grows with its rows."""
    names = [str(name) for name in axes.get_legend_handles_labels()[1]]
    entry = 38 + 0.58 * FONT_SIZE * max(map(len, names))  # points: the handle and its space, and the longest text
    columns = max(1, min(len(names), int(270 / entry)))
    rows = -(-len(names) // columns)
    figure = _figure(axes)
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 3))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def plain(text: str, longest: int = 40) -> str:
    """Shown as it is: matplotlib reads `$…$` as mathematics and drops a legend's entry that begins with `_`."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = text.replace("$", r"\$")
    return f"\N{HAIR SPACE}{text}" if text.startswith("_") else text
