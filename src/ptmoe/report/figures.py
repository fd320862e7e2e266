"""The figures of a report: each function takes runs and returns a `matplotlib.figure.Figure`.

Every figure is as wide as a phone shows without scaling, so its text is read there and on a desktop alike. Nothing
goes through pyplot: no window system, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ptmoe.errors import PtmoeError
from ptmoe.report.runs import Routing, Run, domains_of, labels

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
except ModuleNotFoundError:
    raise PtmoeError("figures need matplotlib: pip install 'ptmoe[report]'") from None

WIDTH = 4.4  # inches, at 72 points each: 317 points
FONT_SIZE = 9.0  # points
ROOMY_ROWS = 3  # of a legend, that every figure has room for
LONGEST_DOMAIN = 22  # characters


@dataclass(frozen=True)
class Theme:
    """Colours of one mode.

    Attributes:
        surface: behind the figure.
        ink: text and axes.
        faint: grid lines.
        methods: a line's colour by method, none below 3:1 against the surface; `other` for those not listed.
        experts: colours of experts, in their order.
        low, high: ends of the colour scale of shares.
        negative: the end of the scale of cosines opposite `high`.
    """

    surface: str
    ink: str
    faint: str
    methods: Mapping[str, str]
    other: str
    experts: tuple[str, ...]
    low: str
    high: str
    negative: str

    def method(self, name: str) -> str:
        return self.methods.get(name, self.other)

    def shares(self) -> Colormap:
        return LinearSegmentedColormap.from_list("shares", [self.low, self.high])

    def cosines(self) -> Colormap:
        return LinearSegmentedColormap.from_list("cosines", [self.negative, self.low, self.high])


# Blue, vermilion and bluish green, told apart with any common colour blindness, go to the methods compared most.
LIGHT = Theme(
    surface="#ffffff",
    ink="#1f2937",
    faint="#e5e7eb",
    methods={
        "pt-moe": "#0072b2",
        "pt": "#d55e00",
        "dpt": "#00805d",
        "smop": "#b0568a",
        "attempt": "#8a6d00",
        "lora": "#5340b8",
        "hydralora": "#882255",
        "ft": "#1f2937",
        "base": "#858b95",
    },
    other="#7a5c3e",
    experts=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7f87", "#5340b8"),
    low="#f1f5f9",
    high="#0b5c94",
    negative="#b34700",
)
DARK = Theme(
    surface="#171b21",
    ink="#e5e7eb",
    faint="#323944",
    methods={
        "pt-moe": "#4fa8e0",
        "pt": "#f08a3c",
        "dpt": "#2fc79b",
        "smop": "#e092be",
        "attempt": "#e3c13b",
        "lora": "#a79bf0",
        "hydralora": "#d9739f",
        "ft": "#f3f4f6",
        "base": "#9aa1ac",
    },
    other="#c9a27e",
    experts=("#4fa8e0", "#e6b23c", "#2fc79b", "#e092be", "#9fd4f5", "#f08a3c", "#9aa1ac", "#a79bf0"),
    low="#222933",
    high="#6db9ec",
    negative="#f08a3c",
)

MARKERS = {"pt-moe": "o", "pt": "s", "dpt": "^", "smop": "D", "attempt": "v", "lora": "P", "hydralora": "X", "ft": "p"}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))  # runs of one method


def loss_curve(run: Run, against: Literal["step", "seconds"]) -> list[tuple[float, float]]:
    """The points of a learning curve: where a finite loss was logged, and the loss."""
    return [
        (at, log.loss)
        for log in run.logs
        if (at := getattr(log, against)) is not None and log.loss is not None and math.isfinite(log.loss)
    ]


def learning_curves(runs: Sequence[Run], against: Literal["step", "seconds"] = "step", theme: Theme = LIGHT) -> Figure:
    """Training loss of each run by optimiser step or by second.

    Raises:
        PtmoeError: no run logged a loss.
    """
    figure, axes = one_plot(theme, height=3.1)
    lines = 0
    for label, run, style in zip(labels(runs), runs, _styles(runs, theme), strict=True):
        points = loss_curve(run, against)
        if points:
            marks = max(1, len(points) // 8)
            axes.plot(*zip(*points, strict=True), label=plain(label), markevery=marks, **style)
            lines += 1
    if not lines:
        raise PtmoeError("no run logged a training loss: metrics.jsonl is missing or holds none")
    axes.set_xlabel("optimiser step" if against == "step" else "seconds of training")
    axes.set_ylabel("training loss")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=theme.faint, linewidth=0.8)
    put_legend(axes, theme)
    return figure


def score_by_domain(runs: Sequence[Run], task: str, theme: Theme = LIGHT) -> Figure:
    """Score in percent over all examples, with its 95 % interval, and in each domain.

    Raises:
        PtmoeError: no run was evaluated on the task.
    """
    shown = [
        (label, run.evaluations[task], style["color"], dash)
        for label, run, style, dash in zip(labels(runs), runs, _styles(runs, theme), _hatches(runs), strict=True)
        if task in run.evaluations
    ]
    if not shown:
        raise PtmoeError(f"no run was evaluated on {task}")
    domains = domains_of(runs, task)
    groups = 1 + len(domains)
    thickness = 1 / (len(shown) + 0.8)
    figure, axes = one_plot(theme, height=0.9 + groups * max(0.3, 0.17 * (len(shown) + 0.8)) + 0.2 * len(shown) / 2)
    for index, (label, evaluation, color, hatch) in enumerate(shown):
        values = [evaluation.score, *(evaluation.domain_score(domain) for domain in domains)]
        offset = (index - (len(shown) - 1) / 2) * thickness
        places = [group + offset for group, value in enumerate(values) if value is not None]
        filled = [value for value in values if value is not None]
        bars = axes.barh(places, filled, 0.86 * thickness, label=plain(label), color=color, hatch=hatch)
        for bar in bars:
            bar.set(edgecolor=theme.surface, linewidth=0)  # the hatch has the edge's colour
        interval = evaluation.score_interval
        if interval:
            around = [[max(0.0, filled[0] - interval[0])], [max(0.0, interval[1] - filled[0])]]
            axes.errorbar(filled[0], places[0], xerr=around, fmt="none", ecolor=theme.ink, elinewidth=1.2, capsize=2.5)
        for group, (place, value) in enumerate(zip(places, filled, strict=True)):
            end = max(value, interval[1]) if group == 0 and interval else value
            axes.annotate(
                f"{value:.1f}",
                (end, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=FONT_SIZE - 1.5,
                color=theme.ink,
            )
    axes.set_yticks(range(groups), ["all", *(plain(domain, LONGEST_DOMAIN) for domain in domains)])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(groups - 0.5, -0.5)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel(f"{shown[0][1].metric}, %")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=theme.faint, linewidth=0.8)
    if domains:
        axes.axhline(0.5, color=theme.ink, linewidth=0.8)
    put_legend(axes, theme)
    return figure


def routing_heat_map(
    shares: Mapping[str, Sequence[float]], theme: Theme = LIGHT, of: Literal["domain", "task"] = "domain"
) -> Figure:
    """The share of each domain, or task, in percent, that each expert takes.

    Args:
        shares: of each domain, a share for each expert, `(N,)`; `Run.shares` or `Routing.use`.
        theme: the colours.
        of: what the shares are of.
    """
    rows = [list(row) for row in shares.values()]
    names = [plain(domain, LONGEST_DOMAIN) or "all" for domain in shares]
    figure = _heat_map(rows, names, theme.shares(), (0.0, 1.0), "{:.0%}", theme)
    figure.axes[0].set_ylabel(of)
    return figure


def similarity_heat_map(similarity: Sequence[Sequence[float]], theme: Theme = LIGHT) -> Figure:
    """Cosine of every pair of expert prompts, `(N, N)`, on a scale from −1 to 1."""
    rows = [list(row) for row in similarity]
    names = [str(index) for index in range(len(rows))]
    figure = _heat_map(rows, names, theme.cosines(), (-1.0, 1.0), "{:.2f}", theme)
    figure.axes[0].set_ylabel("expert")
    return figure


def routing_figures(routing: Routing | Mapping[str, Any], theme: Theme = LIGHT) -> dict[str, Figure]:
    """The heat maps of one task's routing, by file name: `routing`, and `prompt_similarity` where it is known.

    Args:
        routing: a `Routing`, or what `ptmoe.evaluate.routing.summarise_routing` returns.
        theme: the colours.
    """
    known = routing if isinstance(routing, Routing) else Routing(**routing)
    figures = {"routing": routing_heat_map(known.use, theme)}
    if known.prompt_similarity:
        figures["prompt_similarity"] = similarity_heat_map(known.prompt_similarity, theme)
    return figures


def routing_over_training(run: Run, theme: Theme = LIGHT) -> Figure:
    """Which experts the training inputs went to, the router's confidence and the gate's hardness, by step.

    Raises:
        PtmoeError: the run logged no `expert_use`.
    """
    used = [(log.step, log.expert_use) for log in run.logs if log.step is not None and log.expert_use]
    if not used:
        raise PtmoeError(f"{run.folder} logged no expert_use: its method does not route, or it was not trained")
    figure = new_figure(theme, height=4.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, 1])
    for axes in (top, bottom):
        plain_axes(axes, theme)
        axes.set_ylim(0, 1)
    top.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    bottom.set_yticks([0, 0.5, 1])
    steps = [step for step, _ in used]
    experts = len(used[0][1])
    columns = [[use[expert] for _, use in used] for expert in range(experts)]
    colors = [theme.experts[expert % len(theme.experts)] for expert in range(experts)]
    names = [str(expert) for expert in range(experts)]
    top.stackplot(steps, columns, labels=names, colors=colors, edgecolor=theme.surface, linewidth=0.8)
    top.set_ylabel("share of inputs by expert")
    top.set_xlim(min(steps), max(steps) if len(steps) > 1 else min(steps) + 1)
    put_legend(top, theme)
    for name, key, method, dash in (
        ("confidence", "routing_confidence", "pt-moe", "-"),
        ("gate hardness", "hardness", "pt", "--"),
    ):
        points = [
            (log.step, value) for log in run.logs if log.step is not None and (value := getattr(log, key)) is not None
        ]
        if points:
            color = theme.methods[method]
            bottom.plot(*zip(*points, strict=True), label=name, color=color, ls=dash, lw=1.8, clip_on=False)
    bottom.set_xlabel("optimiser step")
    bottom.grid(axis="y", color=theme.faint, linewidth=0.8)
    if bottom.lines:
        put_legend(bottom, theme)
    return figure


def _heat_map(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    colors: Colormap,
    limits: tuple[float, float],
    form: str,
    theme: Theme,
) -> Figure:
    experts = len(rows[0])
    figure, axes = one_plot(theme, height=0.75 + 0.38 * len(rows))
    axes.imshow(rows, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    size = FONT_SIZE if experts <= 6 else max(4.5, FONT_SIZE * 6 / experts)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            red, green, blue, _ = colors((value - limits[0]) / (limits[1] - limits[0]))
            bright = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
            # Black and white reach the same contrast at a luminance of 0.18.
            ink = "black" if bright > 0.18 else "white"
            axes.text(x, y, form.format(value), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xticks(range(experts), [str(expert) for expert in range(experts)])
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel("expert")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    # Thin lines between the cells.
    axes.set_xticks([x - 0.5 for x in range(1, experts)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color=theme.surface, linewidth=2)
    axes.tick_params(which="minor", length=0)
    return figure


def new_figure(theme: Theme, height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), facecolor=theme.surface, layout="constrained")


def one_plot(theme: Theme, height: float) -> tuple[Figure, Axes]:
    figure = new_figure(theme, height)
    axes = figure.subplots()
    plain_axes(axes, theme)
    return figure, axes


def plain_axes(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.surface)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, labelsize=FONT_SIZE, width=0.8)
    axes.xaxis.label.set(color=theme.ink, fontsize=FONT_SIZE)
    axes.yaxis.label.set(color=theme.ink, fontsize=FONT_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
        spine.set_linewidth(0.8)


def put_legend(axes: Axes, theme: Theme) -> None:
    """Above the axes, so that it hides no data, in as many columns as fit; the figure grows with its rows."""
    names = [str(name) for name in axes.get_legend_handles_labels()[1]]
    entry = 38 + 0.58 * FONT_SIZE * max(map(len, names))  # points: the handle and its space, and the longest text
    fitting = max(1, min(len(names), int(270 / entry)))
    rows = -(-len(names) // fitting)
    figure = axes.get_figure(root=True)
    if figure is not None and rows > ROOMY_ROWS:
        figure.set_figheight(figure.get_figheight() + 0.2 * (rows - ROOMY_ROWS))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=fitting,
        frameon=False,
        fontsize=FONT_SIZE,
        labelcolor=theme.ink,
        borderaxespad=0.2,
        borderpad=0.2,
        handlelength=1.8,
        columnspacing=1.2,
    )


def _styles(runs: Sequence[Run], theme: Theme) -> list[dict[str, Any]]:
    """A line for each run: its method's colour and marker, and dashes that tell runs of one method apart."""
    return [
        {
            "color": theme.method(run.method),
            "marker": MARKERS.get(run.method, "."),
            "markersize": 4,
            "linewidth": 1.8,
            "linestyle": DASHES[turn % len(DASHES)],
        }
        for run, turn in zip(runs, _turns(runs), strict=True)
    ]


def _hatches(runs: Sequence[Run]) -> list[str | None]:
    hatches = (None, "////", "....", "xxxx")
    return [hatches[turn % len(hatches)] for turn in _turns(runs)]


def _turns(runs: Sequence[Run]) -> list[int]:
    """How many runs of the same method stand before each run."""
    methods = [run.method for run in runs]
    return [methods[:index].count(method) for index, method in enumerate(methods)]


def plain(text: str, longest: int = 40) -> str:
    """Shown as it is: matplotlib reads `$…$` as mathematics and drops a legend's entry that begins with `_`."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = text.replace("$", r"\$")
    return f"\N{HAIR SPACE}{text}" if text.startswith("_") else text
