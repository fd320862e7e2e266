"""The parts of a report's page: tables, figures in both colour modes, and what they say in words."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ptmoe.report.theme import DARK, LIGHT, drawing, styles  # isort: skip  it says how to install what is missing

import pandas as pd
from matplotlib.figure import Figure

from ptmoe.report import figures, tables
from ptmoe.report.comparison import MEAN, Comparison
from ptmoe.report.results import AVERAGE, Board
from ptmoe.report.table import Table, file_name, metric_name
from ptmoe.report.tables import Routed

PNG_DPI = 200


class Picture(NamedTuple):
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
        tables: shown first.
        pictures: shown next.
        folded: tables that open when asked for.
        numbers: tables that are too long to show, to download.
    """

    heading: str
    explanation: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[Table] = ()
    numbers: Sequence[Table] = ()

    @property
    def anchor(self) -> str:
        return file_name(self.heading, set())


@dataclass
class Gallery:
    """Draws the figures of a page and writes each, in light colours, as PNG and SVG.

    Attributes:
        folder: for the files.
        methods: each label's, which decides its colour and marker.
        names: of the files so far.
    """

    folder: Path
    methods: Mapping[str, str]
    names: set[str] = field(default_factory=set)

    def picture(
        self, title: str, alt: str, draw: Callable[..., Figure], *data: Any, note: str = "", **more: Any
    ) -> Picture:
        """`draw(*data, theme=…, **more)` in both modes; `looks=True` gives it the labels' styles."""
        stem, svg = self.folder / file_name(title, self.names), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for theme in (LIGHT, DARK):
            options = {**more, "theme": theme, **({"looks": styles(self.methods, theme)} if "looks" in more else {})}
            with drawing(theme):
                figure, drawn = draw(*data, **options), io.BytesIO()
                figure.savefig(drawn, format="svg", metadata={"Date": None})
                svg[theme.is_light] = drawn.getvalue()
                if theme.is_light:
                    figure.set_layout_engine("none")  # laid out already, which takes longer than drawing
                    figure.savefig(stem.parent / f"{stem.name}.png", dpi=PNG_DPI)
        (stem.parent / f"{stem.name}.svg").write_bytes(svg[True])
        light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg[mode]).decode()}" for mode in (True, False))
        return Picture(title, note, alt, light, dark)


def trained_text(count: int) -> str:
    return f"{count:,} trainable parameters" if count else "nothing trained"


def sections(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for."""
    yield from _score_sections(comparison, found, gallery)
    yield from _domain_section(comparison, found, gallery)
    yield from _curve_section(comparison, gallery)
    yield from _routing_sections(comparison, gallery)
    if comparison.left_out:
        yield Section(
            "Cells that are left out",
            "Failed, damaged, unfinished, or not started of all methods, tasks and seeds that anything is known of.",
            tables=[tables.left_out_table(comparison)],
        )
    yield Section(
        "Every cell",
        "What all numbers above come from: each finished cell’s scores as its files hold them, and what training took.",
        tables=[tables.cost_table(comparison)],
        numbers=[tables.cell_table(comparison)],
    )


def _score_sections(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    parameters = {cell.label: cell.trainable_parameters for cell in comparison.cells}
    pictures = []
    for board in found:
        shown = [tables.score_table(comparison, board)]
        if board.paired and (board.paired.tasks or board.paired.notes):
            shown.append(tables.paired_table(board.paired, board.metric))
        metric = metric_name(board.metric)
        single = f"{metric} on {board.columns[0].name}" if len(board.columns) == 1 else ""
        yield Section(single or metric, tables=shown)
        if board.ranks and len(board.ranking) > 1:
            means = {label: board.scores[label, AVERAGE].mean for label in board.ranking}
            alt = "; ".join(
                f"{label}: {mean:.1f} % with {trained_text(parameters[label])}" for label, mean in means.items()
            )
            title = f"{single or f'average {metric}'} by trainable parameters"
            pictures.append(gallery.picture(title, alt, figures.score_by_parameters, board, parameters, looks=True))
    if pictures:
        yield Section(
            "Score against trainable parameters",
            "The average over tasks with its 95 % interval. The dashed line joins the methods that none beats with as "
            "few parameters or fewer; a dotted line is a method that trains nothing.",
            pictures=pictures,
        )


def _domain_section(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    pictures, folded = [], []
    for board, column in ((each, column) for each in found if each.ranks for column in each.columns):
        scores = tables.domain_scores(comparison, column, board.metric)
        if len(scores) < 4:  # all examples, the mean of domains, and a single domain
            continue
        folded.append(tables.domain_table(comparison, column, board.metric))
        if column.of != MEAN:
            scores.pop(MEAN, None)  # the table has it
        alt = "; ".join(
            f"{of}: {', '.join(f'{name} {score.mean:.1f}' for name, score in row.items() if score)}"
            for of, row in scores.items()
        )
        title = f"{metric_name(board.metric)} on {column.name} by domain"
        options: dict[str, Any] = {"looks": True, "overall": 1 + (MEAN in scores)}
        pictures.append(gallery.picture(title, alt, figures.scores_by_domain, scores, board.metric, **options))
    if folded:
        yield Section(
            "By domain",
            "Means over seeds. The lines are 95 % intervals; a single seed has none within a domain.",
            pictures=pictures,
            folded=folded,
        )


def _curve_section(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    kinds: tuple[Literal["step", "seconds"], ...] = ("step", "seconds")
    points = pd.concat([figures.curve_points(comparison, against) for against in kinds])
    pictures = []
    for (task, by), part in points.groupby(["trained on", "by"], sort=False):
        ends = [(label, curve["mean loss"].iloc[[0, -1]]) for label, curve in part.groupby("method", sort=False)]
        alt = "; ".join(f"{label}: loss from {first:.3f} to {last:.3f}" for label, (first, last) in ends)
        title = f"loss by {'step' if by == 'step' else 'second'} on {task}"
        pictures.append(gallery.picture(title, alt, figures.learning_curves, part, looks=True))
    if pictures:
        rows = points.to_numpy(object).tolist()
        yield Section(
            "Learning curves",
            "Cross-entropy on the supervised tokens, in nats, as training logged it: the mean over seeds, and a band "
            "from the lowest seed to the highest. A second is the mean of the seeds’ at the same step.",
            pictures=pictures,
            numbers=[Table("learning-curves", "The learning curves’ points", list(points.columns), rows)],
        )


def _routing_sections(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    """Experts of different seeds have nothing to do with each other, so seeds are not averaged: the first is drawn."""
    runs = []
    for cell in comparison.cells:
        title = f"{cell.label} trained on {cell.task}" if len(comparison.tasks) > 1 else cell.label
        note = f"seed {cell.seed}" if len(comparison.of(cell.label, cell.task)) > 1 else ""
        runs.append(Routed(cell.label, cell.task, cell.seed, cell.run, title, note))
    first = list({(run.label, run.trained_on): run for run in reversed(runs)}.values())[::-1]
    if maps := [picture for run in first for picture in _maps(run, gallery)]:
        yield Section(
            "Routing: which expert each domain went to",
            "The share of the inputs that each expert takes (of the gate, for a method that mixes all experts). Mutual "
            "information is 0 where the expert says nothing about the domain. Experts of different seeds have nothing "
            "to do with each other, so each map is of one seed, and the table has all.",
            pictures=maps,
            folded=[tables.routing_table(runs)],
            numbers=[tables.expert_use_table(runs)],
        )
    similar = []
    for run in first:
        if len(square := run.prompt_similarity) > 1:
            rows = (", ".join(f"{value:.2f}" for value in row) for row in square)
            alt = "; ".join(f"expert {index}: {row}" for index, row in enumerate(rows))
            title = f"prompt similarity of {run.title}"
            similar.append(gallery.picture(title, alt, figures.similarity_heat_map, square, note=run.seed_note))
    if similar:
        yield Section(
            "Similarity of the experts’ prompts",
            "Cosine of every pair; 1 is the same direction, 0 none in common.",
            pictures=similar,
            numbers=[tables.similarity_table(runs)],
        )
    trained = []
    for run in first:
        if any(log.step is not None and log.expert_use for log in run.run.logs):
            alt = f"expert use and routing confidence of {run.title} by optimiser step"
            title = f"routing of {run.title} over training"
            trained.append(gallery.picture(title, alt, figures.routing_over_training, run.run, note=run.seed_note))
    if trained:
        yield Section(
            "Routing over training",
            "Top: the share of the training inputs that each expert took. Bottom: the router’s confidence, the mean of "
            "its largest probability, and how far the gate has hardened from all experts to the chosen one.",
            pictures=trained,
            numbers=[tables.training_table(runs)],
        )
    if words := [table for run in first if (table := tables.words_table(run))]:
        yield Section(
            "What the virtual tokens lie near",
            "The words of the base’s vocabulary with the highest cosine. A soft prompt need not lie near any word: a "
            "cosine near 0 says that it does not.",
            folded=words,
            numbers=[tables.nearest_table(runs)],
        )


def _maps(run: Routed, gallery: Gallery) -> Iterator[Picture]:
    """A run's routing by task, where there are several, and by domain for each task that has them."""
    routings = [(task, summary, routing) for task, summary, routing in run.routings() if routing.num_experts > 1]
    maps: list[tuple[str, str, Mapping[str, Sequence[float]], str]] = []
    if len(routings) > 1:
        maps.append(("by task", "task", {task: summary.overall_shares for task, summary, _ in routings}, ""))
    for task, _, routing in routings:
        if len(routings) == 1 or len(routing.use) > 1:
            note = f"mutual information {routing.mutual_information:.2f} nats, entropy {routing.entropy:.2f} nats"
            maps.append((f"on {task}", "domain", routing.shares, note))
    for where, of, shares, note in maps:
        alt = "; ".join(
            f"{domain or 'all'}: {', '.join(f'expert {expert} {share:.0%}' for expert, share in enumerate(row))}"
            for domain, row in shares.items()
        )
        title = f"routing of {run.label if where == f'on {run.trained_on}' else run.title} {where}"
        notes = "; ".join(filter(None, [run.seed_note, note]))
        yield gallery.picture(title, alt, figures.routing_heat_map, shares, note=notes, of=of)
