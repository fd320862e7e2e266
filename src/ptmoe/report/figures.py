"""The figures of a report: each function takes results and returns a `matplotlib.figure.Figure`.

They are drawn and saved within `drawing()`. Every figure is as wide as a phone shows without scaling, so its text is
read there and on a desktop alike. It is drawn once, in the colours of a light page; `inline_svg` says which colour each
has on a dark one. Nothing goes through pyplot: no window system, no global state.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from colorsys import hls_to_rgb
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.report.comparison import AVERAGE, Comparison
from ptmoe.report.results import Board, Score
from ptmoe.report.table import metric_name, short_count
from ptmoe.runs.records import LogLine, RoutingSummary
from ptmoe.settings import OF_PEFT

try:
    import jinja2  # noqa: F401  the page needs it
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
except ModuleNotFoundError:
    raise PtmoeError("a report needs jinja2 and matplotlib: pip install 'ptmoe[report]'") from None

WIDTH = 4.4  # inches, at 72 points each: 317 points
FONT_SIZE = 9.0  # points
LONGEST_DOMAIN = 22  # characters
MOST_POINTS = 200  # of a curve: as many as can be told apart
MOST_MARKS = 2_000  # of a figure with a row for each domain: some 250 inches, drawn in half a minute
SMALLEST, LARGEST = 1_000, 300_000  # trainable parameters that the axis of sizes shows
SMALL = 7.5  # points, of a name beside its mark
CURVE_COLUMNS = ["method", "trained on", "by", "at", "mean loss", "lowest seed", "highest seed", "seeds"]

INK, PAPER, FAINT, UNTOUCHED, HIGH, LOW = "#1f2937", "#ffffff", "#e5e7eb", "#858b95", "#08487a", "#9a3d00"
ON_DARK = {
    INK: "#e5e7eb",
    PAPER: "#171b21",
    FAINT: "#323944",
    UNTOUCHED: "#9aa1ac",
    HIGH: "#6db9ec",
    LOW: "#f08a3c",
}
# Blue, orange and bluish green first: they are told apart with any common colour blindness.
EXPERTS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7f87", "#8f7ee7")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "*")


def drawing() -> AbstractContextManager[None]:
    """Within it, matplotlib draws as a report does, takes no text for mathematics, and gives the same bytes again."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, INK)
    style |= dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), FONT_SIZE)
    style |= {"grid.color": FAINT, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"font.size": FONT_SIZE, "lines.linewidth": 1.8, "lines.markersize": 5.5, "legend.frameon": False}
    return rc_context(style | {"text.parse_math": False, "svg.hashsalt": "ptmoe"})


class Style(NamedTuple):
    """How a label looks in every figure, on a light and on a dark page."""

    color: str
    dark: str
    marker: str


def styles(methods: Mapping[str, str]) -> dict[str, Style]:
    """Each label's colours and marker: its method's own (`figure_color`, `figure_marker`), where it has them and is not
    there at several sizes; otherwise the labels share the circle of hues."""
    found, counts = {}, Counter(methods.values())
    for place, (label, method) in enumerate(methods.items()):
        config, hue = METHODS.get(method), (0.05 + place / len(methods)) % 1
        color, dark = (to_hex(hls_to_rgb(hue, lightness, 0.55)) for lightness in (0.34, 0.72))
        marker = MARKERS[place % len(MARKERS)]
        if config is None and not method.startswith(OF_PEFT):
            color, dark = UNTOUCHED, ON_DARK[UNTOUCHED]
        elif config is not None and counts[method] == 1:
            color, dark = config.figure_color or (color, dark)
            marker = config.figure_marker or marker
        found[label] = Style(color, dark, marker)
    return found


def inline_svg(figure: Figure, name: str, looks: Iterable[Style] = ()) -> str:
    """The figure as an element of a page: its colours follow the page's mode, and its ids begin with `name`."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    dark = ON_DARK | {style.color: style.dark for style in looks}
    svg = written.getvalue()
    svg = re.sub("#[0-9a-f]{6}", lambda at: f"light-dark({at[0]}, {dark[at[0]]})" if at[0] in dark else at[0], svg)
    svg = re.sub(r"""( id="|href="#|url\(#)""", rf"\g<1>{name}-", svg[svg.index("<svg") :])
    # What only a file of its own needs, and the texts as comments beside their outlines.
    return re.sub(r'<metadata>.*?</metadata>|<!--.*?-->| xmlns(:\w+)?="[^"]*"', "", svg, flags=re.DOTALL)


def score_by_parameters(board: Board, parameters: Mapping[str, int], looks: Mapping[str, Style]) -> Figure:
    """Average score against trainable parameters, on a logarithmic axis, with 95 % intervals.

    The dashed line joins the labels that none beats with as few parameters or fewer (the Pareto front), which are named
    beside their points. What trains nothing has no place on the axis and is a line across. Where sizes differ by more
    than a factor of three the axis goes from 1k to 300k at least, so that figures of several comparisons can be laid
    side by side.
    """
    figure, axes = plot("trainable parameters", f"{metric_name(board.metric)}, %", height=3.3)
    scored = {label: board.scores[label, AVERAGE] for label in board.ranking}
    for label, score in scored.items():
        color, _, marker = looks[label]
        if parameters[label]:
            error = np.abs(np.array([score.ends]).T - score.mean)
            axes.errorbar(
                parameters[label], score.mean, error, color=color, marker=marker, linestyle="none", label=plain(label)
            )
        else:
            axes.axhline(score.mean, color=color, linewidth=1.4, linestyle=":", label=plain(label))
    front = pareto_front({label: (parameters[label], score.mean) for label, score in scored.items()})
    places = [(parameters[label], scored[label].mean) for label in front]
    if places:
        axes.plot(*zip(*places, strict=True), color=INK, alpha=0.35, linewidth=1, linestyle="--", zorder=1)
    axes.set_xscale("log")
    axes.margins(0.12)
    counts = [parameters[label] for label in scored if parameters[label]]
    if counts and max(counts) > 3 * min(counts):
        axes.set_xlim(min(SMALLEST, 0.7 * min(counts)), max(LARGEST, 1.4 * max(counts)))
    left, right = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator() if right > 20 * left else MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")
    show_legend(axes)
    _name_points(figure, axes, dict(zip(front, places, strict=True)))
    return figure


def pareto_front(points: Mapping[str, tuple[int, float]]) -> list[str]:
    """The labels that none beats with as few parameters or fewer, from their parameters and scores; the smallest first.
    What trains nothing is not among them."""
    front: list[str] = []
    for label, (count, score) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if count and (not front or score > points[front[-1]][1]):
            front.append(label)
    return front


def _name_points(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Names to the upper left of the points of a rising line, where nothing else is, within the axes' sides; raised
    where they would meet."""
    options: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "va": "bottom", "fontsize": SMALL}
    options |= {"annotation_clip": False, "path_effects": [withStroke(linewidth=1.5, foreground=PAPER)]}
    options |= {"in_layout": False}  # or the axes would move when a name does
    texts = [axes.annotate(plain(label, 24), place, (-4, 2), **options) for label, place in points.items()]
    figure.set_dpi(72)  # so that a text is measured in points, and rather too wide than too narrow
    figure.draw_without_rendering()  # places the axes
    taken = list[Any]()
    for text in texts:
        over = axes.get_window_extent().x0 - text.get_window_extent().x0
        text.xyann = (text.xyann[0] + max(0.0, over), text.xyann[1])
        while any(text.get_window_extent().overlaps(other) for other in taken):
            text.xyann = (text.xyann[0], text.xyann[1] + SMALL)
        taken.append(text.get_window_extent())


def curve_points(comparison: Comparison, against: Literal["step", "seconds"]) -> pd.DataFrame:
    """The learning curves: each label's and task's mean loss over its seeds, the lowest and the highest, at the steps
    that all seeds logged; a step's second is the mean of the seconds at which the seeds reached it."""
    logs = pd.DataFrame(
        [
            (cell.label, cell.task, against, log.step, getattr(log, against), log.loss, cell.seed)
            for cell in comparison.cells
            for log in sorted(cell.run.logs, key=lambda log: log.step or 0)
        ],
        columns=["method", "trained on", "by", "step", "at", "loss", "seed"],
    ).astype({"at": float, "loss": float})
    logs = logs[np.isfinite(logs["loss"])].dropna()
    logs = logs.drop_duplicates(["method", "trained on", "step", "seed"], keep="last")
    curve = ["method", "trained on", "by"]
    columns: dict[str, Any] = {"at": ("at", "mean"), "mean loss": ("loss", "mean"), "lowest seed": ("loss", "min")}
    columns |= {"highest seed": ("loss", "max"), "seeds": ("seed", "size"), "all": ("all", "first")}
    steps = logs.assign(all=logs.groupby(curve)["seed"].transform("nunique")).groupby([*curve, "step"], sort=False)
    points = steps.agg(**columns).reset_index().query("seeds == all")
    to_the_end = points.groupby(curve).cumcount(ascending=False)
    lengths = points.groupby(curve)["at"].transform("size")
    return points[to_the_end % np.ceil(lengths / MOST_POINTS) == 0][CURVE_COLUMNS]


def learning_curves(points: pd.DataFrame, looks: Mapping[str, Style]) -> Figure:
    """Each label's mean training loss over its seeds, from one task's `curve_points`; the band goes from the lowest
    seed to the highest."""
    by = "optimiser step" if points["by"].iat[0] == "step" else "seconds of training"
    figure, axes = plot(by, "training loss", height=3.1)
    for label, curve in points.groupby("method", sort=False):
        color, _, marker = looks[label]
        every = max(1, len(curve) // 6)
        axes.plot("at", "mean loss", data=curve, label=plain(label), color=color, marker=marker, markevery=every)
        axes.fill_between("at", "lowest seed", "highest seed", data=curve, color=color, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.grid(axis="y")
    show_legend(axes)
    return figure


def scores_by_domain(
    scores: Mapping[str, Mapping[str, Score]], metric: str, overall: int, looks: Mapping[str, Style]
) -> Figure:
    """A point for each label in each domain, with its 95 % interval, from each row's scores by label. A line separates
    the first rows, `overall`, which are over all domains, from the others."""
    labels = list(dict.fromkeys(label for row in scores.values() for label in row))
    pitch = 0.17 if len(labels) < 6 else 0.13  # inches from one label's point to the next
    row_height = pitch * len(labels) + 0.16
    figure, axes = plot(f"{metric_name(metric)}, %", "", height=0.95 + len(scores) * row_height)
    for turn, label in enumerate(labels):
        color, _, marker = looks[label]
        offset = (turn - (len(labels) - 1) / 2) * pitch / row_height
        found = [(place + offset, row[label]) for place, row in enumerate(scores.values()) if label in row]
        places, means = [place for place, _ in found], np.array([score.mean for _, score in found])
        error = np.abs(np.array([score.ends for _, score in found]).T - means)
        axes.errorbar(
            means, places, xerr=error, color=color, marker=marker, linestyle="none", label=plain(label), clip_on=False
        )
    for edge in range(1, len(scores)):
        axes.axhline(edge - 0.5, color=INK if edge == overall else FAINT, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(scores)), [plain(name, LONGEST_DOMAIN) for name in scores])
    for text in axes.get_yticklabels()[:overall]:
        text.set_fontweight("bold")
    axes.set(ylim=(len(scores) - 0.5, -0.5), xlim=(0, 100), xticks=range(0, 101, 25))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    show_legend(axes)
    return figure


def routing_heat_map(shares: Mapping[str, Sequence[float]], of: str = "domain") -> Figure:
    """The share of each domain, or task, in percent, that each expert takes: `(N,)` for each."""
    return _heat_map(list(shares.values()), [plain(name, LONGEST_DOMAIN) or "all" for name in shares], of, "{:.0%}")


def similarity_heat_map(similarity: Sequence[Sequence[float]]) -> Figure:
    """Cosine of every pair of expert prompts, `(N, N)`."""
    return _heat_map(similarity, [str(index) for index in range(len(similarity))], "expert", "{:.2f}")


def routing_figures(routing: RoutingSummary) -> dict[str, Figure]:
    """The heat maps of one task's routing, by file name: `routing`, and `prompt_similarity` where it is known."""
    figures = {"routing": routing_heat_map(routing.shares)}
    if routing.prompt_similarity:
        figures["prompt_similarity"] = similarity_heat_map(routing.prompt_similarity)
    return figures


def _heat_map(rows: Sequence[Sequence[float]], names: Sequence[str], of: str, form: str) -> Figure:
    """Values from −1 to 1: the larger, the more of the colour of its sign covers the page, in either mode."""
    experts = len(rows[0])
    figure, axes = plot("expert", of, height=0.75 + 0.38 * len(rows))
    size = FONT_SIZE if experts <= 6 else max(4.5, FONT_SIZE * 6 / experts)
    for (y, x), value in np.ndenumerate(np.array(rows)):
        color, cover = (HIGH if value >= 0 else LOW), min(1.0, 0.06 + 0.94 * abs(value))
        axes.add_patch(Rectangle((x - 0.49, y - 0.47), 0.98, 0.94, color=color, alpha=cover, linewidth=0))
        ink = INK if cover < 0.65 else PAPER
        axes.text(x, y, form.format(value), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xticks(range(experts), [str(expert) for expert in range(experts)])
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=(-0.5, experts - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def routing_over_training(logs: Sequence[LogLine]) -> Figure:
    """Which experts the training inputs were routed to, the router's confidence and the gate's hardness, by step, from
    the lines of a log that have `expert_use`."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    steps, shares = [log.step for log in logs], np.array([log.expert_use for log in logs]).T
    colors = [EXPERTS[expert % len(EXPERTS)] for expert in range(len(shares))]
    top.stackplot(steps, shares, labels=[str(expert) for expert in range(len(shares))], colors=colors)
    top.margins(x=0)
    top.set(ylim=(0, 1), ylabel="share of inputs by expert", yticks=[0, 0.25, 0.5, 0.75, 1])
    top.yaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
    for name, key, expert, line in (
        ("confidence", "routing_confidence", 0, "-"),
        ("gate hardness", "hardness", 5, "--"),
    ):
        if any(getattr(log, key) is not None for log in logs):
            values = np.array([getattr(log, key) for log in logs], dtype=float)
            bottom.plot(steps, values, line, label=name, color=EXPERTS[expert], clip_on=False)
    bottom.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlabel="optimiser step")
    bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    bottom.grid(axis="y")
    for axes in (top, bottom):
        show_legend(axes)
    return figure


def plot(xlabel: str, ylabel: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def show_legend(axes: Axes) -> None:
    """Above the axes, so that it hides no data, in as many columns as fit; the figure grows with its rows."""
    names, figure = [str(name) for name in axes.get_legend_handles_labels()[1]], axes.get_figure(root=True)
    if names and figure is not None:

        def width(columns: int) -> float:
            """In points: in each column the handle and its space, and the longest text."""
            return sum(38 + 0.58 * FONT_SIZE * max(map(len, part)) for part in np.array_split(names, columns))

        columns = max((count for count in range(1, len(names) + 1) if width(count) <= 270), default=1)
        figure.set_figheight(figure.get_figheight() + 0.2 * max(0, -(-len(names) // columns) - 3))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def plain(text: str, longest: int = 40) -> str:
    """Cut where it is too long, and shown whatever it is: matplotlib drops a legend's entry that begins with `_`."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f"\N{HAIR SPACE}{text}" if text.startswith("_") else text
