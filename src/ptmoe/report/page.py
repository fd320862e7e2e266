"""`report.html`: what a comparison or a run found, as one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ptmoe.report import figures  # isort: skip  it says how to install what is missing

import pandas as pd
from jinja2 import Environment, StrictUndefined

from ptmoe.report.comparison import MEAN, Comparison, counted_states, read_comparison, single_run
from ptmoe.report.figures import Figure
from ptmoe.report.results import ALPHA, AVERAGE, Board, Score, boards
from ptmoe.report.table import Table, file_name, interval_text, metric_name
from ptmoe.report.tables import (
    Routed,
    cell_table,
    cost_table,
    domain_scores,
    domain_table,
    left_out_table,
    p_text,
    paired_table,
    routing_tables,
    score_table,
    words_table,
)
from ptmoe.report.theme import DARK, LIGHT, drawing, styles
from ptmoe.runs.folders import CONFIG_FILE, PLAN_FILE, Run, is_run
from ptmoe.runs.records import EvaluationSummary

PNG_DPI = 200
LONGEST_PART = 11  # letters of a word that is too long for a column


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


def write_run_report(folder: str | Path) -> Path | None:
    """The page of a single run; None, and nothing is written, where the folder holds no finished run.

    Raises:
        PtmoeError: the run is damaged.
    """
    return _write(single_run(folder)) if is_run(Path(folder)) else None


def write_report(folder: str | Path, command: str | None = None) -> Path:
    """Write `report.html`, `figures/*.{png,svg}` and `tables/*.{csv,json,md,tex}` into a comparison's folder.

    Args:
        folder: as `ptmoe compare` writes it.
        command: what repeats all of it; by default `ptmoe compare FOLDER/comparison.yaml`.

    Returns:
        The page's path.

    Raises:
        PtmoeError: no cell is finished, or the plan is damaged.
    """
    return _write(read_comparison(folder), command)


def _write(comparison: Comparison, command: str | None = None) -> Path:
    folder = comparison.folder
    gallery = Gallery(folder / "figures", {cell.label: cell.method for cell in comparison.cells})
    sections = list(_own_files(_sections(comparison, gallery)))
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for section in sections:
        for table in (*section.tables, *section.folded, *section.numbers):
            for name, text in table.files().items():
                (folder / "tables" / name).write_text(text, encoding="utf-8", newline="")
    file = CONFIG_FILE if comparison.single else PLAN_FILE
    verb = "train" if comparison.single else "compare"
    if command is None:
        trained = any(cell.trainable_parameters for cell in comparison.cells)
        command = f"ptmoe {verb} {shlex.quote((folder / file).as_posix())}" if trained else ""
    first = comparison.cells[0]
    title = f"{first.label} on {first.task}" if comparison.single else f"Comparison {folder.resolve().name}"
    text = files("ptmoe.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(text).render(
        parts=lambda name: re.findall(rf"[^\W_]{{1,{LONGEST_PART}}}[\W_]*|[\W_]+", name),
        title=str(comparison.plan.get("title") or title),
        subtitle=_extent(comparison),
        summary=[_in_words(comparison, board) for board in boards(comparison) if board.ranks]
        or ["Nothing was evaluated."],
        warnings=list(_warnings(comparison)),
        sections=sections,
        facts=[
            ("Configuration", *facts([file], [flat(comparison.plan)])),
            ("Versions, commit and hardware", *_environments(comparison)),
        ],
        command=command,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _own_files(sections: Iterable[Section]) -> Iterator[Section]:
    """The same sections, their tables under names of files that no other table of the page has."""
    used: set[str] = set()
    for section in sections:
        parts = {
            name: [replace(table, name=file_name(table.name, used)) for table in getattr(section, name)]
            for name in ("tables", "folded", "numbers")
        }
        yield replace(section, **parts)


def _extent(comparison: Comparison) -> str:
    """How much of what is compared."""
    tasks = comparison.tasks
    seeds = {cell.seed for cell in comparison.cells if cell.trainable_parameters}
    cells = [_counted(len(comparison.labels), "method"), _counted(len(seeds), "seed")]
    cells.append(_counted(len(comparison.cells), "finished cell"))
    trained = f"trained on {listed(tasks) if len(tasks) < 4 else _counted(len(tasks), 'task')}"
    return " · ".join([f"base {listed(comparison.bases)}", trained, *([] if comparison.single else cells)])


def _in_words(comparison: Comparison, board: Board) -> str:
    """What a table shows, in sentences that hold for any data."""
    metric = metric_name(board.metric)
    where = f"on {board.columns[0].name}" if len(board.columns) == 1 else f"on average over {len(board.columns)} tasks"
    if not board.ranking:
        return f"No method has a finished cell for each task, so no average {metric} can be compared."
    parameters = _parameters(comparison)
    reached = [
        (label, score, f"{_score_text(score)}", _trained_text(parameters[label]))
        for label in board.ranking
        for score in [board.scores[label, AVERAGE]]
    ]
    label, score, text, trained = reached[0]
    found = f"{label} reaches {metric} {text} {where} with {trained}"
    if len(reached) == 1:
        return f"{found}."
    other, second, text, trained = reached[1]
    if f"{score.mean:.1f}" == f"{second.mean:.1f}":
        found += f", level with {other}."
    else:
        found += f", the most of {len(reached)}; {other} follows with {text} and {trained}."
    tests = board.paired
    test = tests and (tests.average or (tests.tasks[0] if len(board.columns) == len(tests.tasks) == 1 else None))
    if not test:
        return f"{found} The two were not tested on the same examples."
    verdict = "more than chance explains" if test.p < ALPHA else "which chance explains as well"
    p = p_text(test.p)
    return (
        f"{found} On the same {test.examples:,} examples they differ by {test.difference.mean:.1f} points "
        f"{interval_text(test.difference)}, {verdict} (p {p if p.startswith('<') else f'= {p}'})."
    )


def _score_text(score: Score) -> str:
    if score.over == "seeds":
        return f"{score.mean:.1f} {interval_text(score)} % ({len(score.seeds)} seeds)"
    return f"{score.mean:.1f} % {interval_text(score)}".strip()


def _trained_text(count: int) -> str:
    return f"{count:,} trainable parameters" if count else "nothing trained"


def _parameters(comparison: Comparison) -> dict[str, int]:
    return {cell.label: cell.trainable_parameters for cell in comparison.cells}


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def listed(words: Iterable[str]) -> str:
    """Joined as people do: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _warnings(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """What a reader has to know before the numbers: a heading, and lines below it."""
    lines = []
    for label in comparison.labels:
        for trained_on in comparison.tasks:
            cells = comparison.of(label, trained_on)
            for task in dict.fromkeys(task for cell in cells for task in cell.eval_tasks):
                fallen = [
                    (cell.seed, text) for cell in cells if (text := _collapse(cell.run, cell.run.evaluations[task]))
                ]
                if fallen:
                    after = f" trained on {trained_on}" if trained_on != task else ""
                    of = f"{len(fallen)} of {_counted(len(cells), 'seed')}"
                    lines.append(f"{label}{after} on {task}, {of}; with seed {fallen[0][0]} {fallen[0][1]}")
    if lines:
        yield "Routing collapsed.", lines
    if comparison.left_out:
        counted = counted_states(comparison.left_out)
        yield "Not every cell is in the numbers.", [f"{counted}; they are listed under “Cells that are left out”."]


def _collapse(run: Run, summary: EvaluationSummary) -> str:
    """That a run's routing collapsed on a task, in words; empty where it did not."""
    expert, shares = summary.collapsed_expert, summary.overall_shares
    if expert is None or summary.routing is None:
        return ""
    off = [key for key in ("router_standardize", "routing_anneal") if run.config["method"].get(key) is False]
    guard = f" Off in this run, and meant against it: {', '.join(off)}." if off else ""
    takes = f"takes {100 * shares[expert]:.1f} % of the {'gate' if summary.routing.is_soft else 'inputs'}"
    return f"expert {expert} {takes}, the other {len(shares) - 1} next to nothing.{guard}"


def _sections(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for."""
    found = boards(comparison)
    yield from _score_sections(comparison, found, gallery)
    yield from _domain_section(comparison, found, gallery)
    yield from _curve_section(comparison, gallery)
    yield from _routing_sections(comparison, gallery)
    if comparison.left_out:
        yield Section(
            "Cells that are left out",
            "Failed, damaged, unfinished, or not started of the grid of all methods, tasks and seeds that anything is known "
            "of.",
            tables=[left_out_table(comparison)],
        )
    yield Section(
        "Every cell",
        "What all numbers above come from: each finished cell’s scores as its files hold them, and what training took.",
        tables=[cost_table(comparison)],
        numbers=[cell_table(comparison)],
    )


def _score_sections(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    parameters = _parameters(comparison)
    pictures = []
    for board in found:
        paired = board.paired
        tables = [score_table(comparison, board)]
        if paired and (paired.tasks or paired.notes):
            tables.append(paired_table(paired, board.metric))
        metric, single = metric_name(board.metric), board.columns[0].name if len(board.columns) == 1 else ""
        yield Section(f"{metric} on {single}" if single else metric, tables=tables)
        if board.ranks and len(board.ranking) > 1:
            scores = [(label, board.scores[label, AVERAGE].mean) for label in board.ranking]
            alt = "; ".join(f"{label}: {mean:.1f} % with {_trained_text(parameters[label])}" for label, mean in scores)
            title = (
                f"{metric} on {single} by trainable parameters"
                if single
                else f"average {metric} by trainable parameters"
            )
            pictures.append(gallery.picture(title, alt, figures.score_by_parameters, board, parameters, looks=True))
    if pictures:
        yield Section(
            "Score against trainable parameters",
            "The average over tasks with its 95 % interval. The dashed line joins the methods that none beats with as few "
            "parameters or fewer; a dotted line is a method that trains nothing.",
            pictures=pictures,
        )


def _domain_section(comparison: Comparison, found: Sequence[Board], gallery: Gallery) -> Iterator[Section]:
    pictures, tables = [], []
    for board in found if found else ():
        for column in board.columns if board.ranks else ():
            scores = domain_scores(comparison, column, board.metric)
            if len(scores) < 4:  # all examples, the mean of domains, and a single domain
                continue
            tables.append(domain_table(comparison, column, board.metric))
            if column.of != MEAN:
                scores.pop(MEAN, None)  # the table has it
            lines = {
                of: ", ".join(f"{name} {score.mean:.1f}" for name, score in row.items() if score)
                for of, row in scores.items()
            }
            title = f"{metric_name(board.metric)} on {column.name} by domain"
            alt = "; ".join(f"{of}: {line}" for of, line in lines.items())
            overall = 2 if MEAN in scores else 1
            pictures.append(
                gallery.picture(title, alt, figures.scores_by_domain, scores, board.metric, looks=True, overall=overall)
            )
    if tables:
        yield Section(
            "By domain",
            "Means over seeds. The lines are 95 % intervals; a single seed has none within a domain.",
            pictures=pictures,
            folded=tables,
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
        yield Section(
            "Learning curves",
            "Cross-entropy on the supervised tokens, in nats, as training logged it: the mean over seeds, and a band from the "
            "lowest seed to the highest. A second is the mean of the seeds’ at the same step.",
            pictures=pictures,
            numbers=[
                Table(
                    "learning-curves",
                    "The learning curves’ points",
                    list(points.columns),
                    points.to_numpy(object).tolist(),
                )
            ],
        )


def _routing_sections(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    """Experts of different seeds have nothing to do with each other, so seeds are not averaged: the first is drawn."""
    several = len(comparison.tasks) > 1
    runs = [
        Routed(
            cell.label,
            cell.task,
            cell.seed,
            cell.run,
            f"{cell.label} trained on {cell.task}" if several else cell.label,
            f"seed {cell.seed}" if len(comparison.of(cell.label, cell.task)) > 1 else "",
        )
        for cell in comparison.cells
    ]
    shown = list({(run.label, run.trained_on): run for run in reversed(runs)}.values())[::-1]
    tables = routing_tables(runs)
    if maps := [picture for run in shown for picture in _maps(run, gallery)]:
        yield Section(
            "Routing: which expert each domain went to",
            "The share of the inputs that each expert takes (of the gate, for a method that mixes all experts). Mutual "
            "information is 0 where the expert says nothing about the domain. Experts of different seeds have nothing to do "
            "with each other, so each map is of one seed, and the table has all.",
            pictures=maps,
            folded=[tables["routing"]],
            numbers=[tables["use"]],
        )
    alike = [(run, square) for run in shown if len(square := run.prompt_similarity) > 1]
    if alike:
        yield Section(
            "Similarity of the experts’ prompts",
            "Cosine of every pair; 1 is the same direction, 0 none in common.",
            pictures=[
                gallery.picture(
                    f"prompt similarity of {run.title}",
                    "; ".join(
                        f"expert {index}: {', '.join(f'{value:.2f}' for value in row)}"
                        for index, row in enumerate(square)
                    ),
                    figures.similarity_heat_map,
                    square,
                    note=run.seed_note,
                )
                for run, square in alike
            ],
            numbers=[tables["similarity"]],
        )
    logged = [run for run in shown if any(log.step is not None and log.expert_use for log in run.run.logs)]
    if logged:
        yield Section(
            "Routing over training",
            "Top: the share of the training inputs that each expert took. Bottom: the router’s confidence, the mean of its "
            "largest probability, and how far the gate has hardened from all experts to the chosen one.",
            pictures=[
                gallery.picture(
                    f"routing of {run.title} over training",
                    f"expert use and routing confidence of {run.title} by optimiser step",
                    figures.routing_over_training,
                    run.run,
                    note=run.seed_note,
                )
                for run in logged
            ],
            numbers=[tables["training"]],
        )
    if words := [table for run in shown if (table := words_table(run))]:
        yield Section(
            "What the virtual tokens lie near",
            "The words of the base’s vocabulary with the highest cosine. A soft prompt need not lie near any word: a cosine "
            "near 0 says that it does not.",
            folded=words,
            numbers=[tables["words"]],
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


Facts = tuple[list[str], list[tuple[str, list[str], bool]]]


def facts(names: Sequence[str], mappings: Sequence[Mapping[str, Any]]) -> Facts:
    """The columns' names, and the rows: a name, its value in each mapping, and whether they differ."""
    rows = []
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        values = [mapping.get(key, "–") for mapping in mappings]
        texts = [
            value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
            for value in values
        ]
        rows.append((key, texts, len(set(texts)) > 1))
    return list(names), rows


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names; those of a list go by their label, name or number."""
    options: dict[str, Any] = {}
    for key, value in config.items():
        inner = value
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            inner = {str(entry.get("label", entry.get("name", place))): entry for place, entry in enumerate(value)}
        if isinstance(inner, dict) and inner:
            options |= flat(inner, f"{prefix}{key}.")
        else:
            options[f"{prefix}{key}"] = value
    return options


def _environments(comparison: Comparison) -> Facts:
    """Seeds differ by plan; what else the cells ran on is a column for each different machine or set of versions."""
    different: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for cell in comparison.cells:
        environment = cell.run.environment
        known = {"commit": environment.commit or "not a checkout", **environment.hardware}
        known |= {"seed": cell.seed} if comparison.single else {}
        known |= {name: version or "not installed" for name, version in environment.versions.items()}
        paths = environment.fast_paths or {}
        known |= {f"fast path: {name}": "in use" if why is None else why for name, why in paths.items()}
        different.setdefault(repr(known), ([], known))[0].append(f"{cell.label}/{cell.task}/seed-{cell.seed}")
    names = [f"{cells[0]} and {len(cells) - 1} more" if len(cells) > 1 else cells[0] for cells, _ in different.values()]
    return facts(names if len(names) > 1 else ["value"], [known for _, known in different.values()])
