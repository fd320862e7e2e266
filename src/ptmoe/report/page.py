"""`report.html`: what a comparison or a run found, as one file that needs nothing else."""

import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from ptmoe.files import write_whole
from ptmoe.report.comparability import incomparable
from ptmoe.report.comparison import AVERAGE, Comparison, counted_states, read_comparison, single_run
from ptmoe.report.costs import rate_warnings
from ptmoe.report.figures import styles
from ptmoe.report.gallery import Gallery, Section
from ptmoe.report.results import ALPHA, Board, Score, boards
from ptmoe.report.sections import p_text, sections, trained_text
from ptmoe.report.table import file_name, metric_name
from ptmoe.runs.folders import CONFIG_FILE, PLAN_FILE, is_run
from ptmoe.settings import yaml_text

OF_A_CELL = {"seed", "options", "data", "changes"}  # of its environment, as the plan says or the report does elsewhere
LONGEST_PART = 11  # letters of a word that is too long for a column


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
    folder, first, found = comparison.folder, comparison.cells[0], boards(comparison)
    shown = list(sections(comparison, found, Gallery(folder / "figures", styles(comparison.methods))))
    verb, file, title = "compare", folder / PLAN_FILE, f"Comparison {folder.resolve().name}"
    if comparison.single:
        verb, file, title = "train", folder / CONFIG_FILE, f"{first.label} on {first.task}"
    if command is None:
        trained = any(cell.trainable_parameters for cell in comparison.cells)
        command = f"ptmoe {verb} {shlex.quote(file.as_posix())}" if trained else ""
    return write_page(
        folder,
        shown,
        title=str(comparison.plan.get("title") or title),
        subtitle=_extent(comparison),
        summary=[_in_words(comparison, board) for board in found if board.ranks] or ["Nothing was evaluated."],
        warnings=list(_warnings(comparison)),
        documents=list(_documents(comparison, file)),
        command=command,
    )


def write_page(
    folder: Path,
    shown: list[Section],
    *,
    title: str,
    subtitle: str,
    summary: list[str],
    documents: list[tuple[str, str]],
    command: str,
    warnings: Sequence[tuple[str, list[str]]] = (),
) -> Path:
    """`report.html`, and `tables/*` of its sections. Tables and figures that only the page before had are deleted."""
    from jinja2 import Environment, StrictUndefined  # `figures` says how to install it

    (folder / "tables").mkdir(parents=True, exist_ok=True)
    used: set[str] = set()
    for table in (table for section in shown for table in section.tables):
        table.name = file_name(table.name, used)
        used.add(table.name)
        for name, (_, text, _) in table.files().items():
            write_whole(folder / "tables" / name, text)
    text = files("ptmoe.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(text).render(
        parts=lambda name: re.findall(rf"[^\W_]{{1,{LONGEST_PART}}}[\W_]*|[\W_]+", name),
        file_name=file_name,
        title=title,
        subtitle=subtitle,
        summary=summary,
        warnings=warnings,
        sections=shown,
        documents=documents,
        command=command,
    )
    path = folder / "report.html"
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    write_whole(path, page)
    marks = {file: f'download="{file.name}"' for file in folder.glob("tables/*")}
    marks |= {file: f' id="{file.stem}-figure_1"' for file in folder.glob("figures/*")}  # as `inline_svg` names them
    for file, mark in marks.items():
        if mark in before and mark not in page:
            file.unlink()
    return path


def _extent(comparison: Comparison) -> str:
    """How much of what is compared."""
    seeds = {cell.seed for cell in comparison.cells if cell.trainable_parameters}
    counts = {"methods": comparison.labels, "seeds": seeds, "finished cells": comparison.cells}
    parts = [f"base {', '.join(comparison.bases)}", f"trained on {', '.join(comparison.tasks)}"]
    parts += [] if comparison.single else [f"{what}: {len(items):,}" for what, items in counts.items()]
    return " · ".join(parts)


def _in_words(comparison: Comparison, board: Board) -> str:
    """What a table shows, in sentences that hold for any data."""
    metric = metric_name(board.metric)
    where = f"on {board.columns[0].name}" if len(board.columns) == 1 else f"on average over {len(board.columns)} tasks"
    if not board.ranking:
        return f"No method has a finished cell for each task, so no average {metric} can be compared."
    trained = [trained_text(comparison.of(label)[0].trainable_parameters) for label in board.ranking]
    scores = [board.scores[label, AVERAGE] for label in board.ranking]
    found = f"{board.ranking[0]} reaches {metric} {_score_text(scores[0])} {where} with {trained[0]}"
    if len(scores) == 1:
        return f"{found}."
    other = board.ranking[1]
    if f"{scores[0].mean:.1f}" == f"{scores[1].mean:.1f}":
        found += f", level with {other}."
    else:
        found += f", the most of {len(scores)}; {other} follows with {_score_text(scores[1])} and {trained[1]}."
    test = next((test for test in board.tests if test.name == board.names[-1]), None)
    if test is None:
        return f"{found} The two were not tested on the same examples."
    verdict = "more than chance explains" if test.p < ALPHA else "which chance explains as well"
    p = p_text(test.p)
    return (
        f"{found} On the same {test.examples:,} examples they differ by {test.difference.mean:.1f} points "
        f"{test.difference.interval}, {verdict} (p {p if p.startswith('<') else f'= {p}'})."
    )


def _score_text(score: Score) -> str:
    if score.over == "seeds":
        return f"{score.mean:.1f} {score.interval} % ({len(score.seeds)} seeds)"
    return f"{score.mean:.1f} % {score.interval}".strip()


def _warnings(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """What a reader has to know before the numbers: a heading, and lines below it."""
    fallen: dict[tuple[str, str, str], list[str]] = {}
    alike: dict[tuple[str, str], set[int]] = {}
    for cell, task in ((each, task) for each in comparison.cells for task in each.eval_tasks):
        summary, method = cell.run.evaluations[task], cell.run.config["method"]
        shares = summary.overall_shares
        if summary.routing is not None and summary.routing.one_expert:
            alike.setdefault((cell.label, cell.task), set()).add(cell.seed)
        if summary.routing is not None and summary.collapsed_expert is not None:
            of = "gate" if summary.routing.is_soft else "inputs"
            off = [name for name in ("router_standardize", "routing_anneal") if method.get(name) is False]
            guard = f" Off in this run, and meant against it: {', '.join(off)}." if off else ""
            fallen.setdefault((cell.label, cell.task, task), []).append(
                f"with seed {cell.seed} expert {summary.collapsed_expert} takes {100 * max(shares):.1f} % of the {of}, "
                f"the other {len(shares) - 1} next to nothing.{guard}"
            )
    forced = [
        f"{cell.label} on {cell.task}, seed {cell.seed}, since step {change.step:,}: {name} was {before}, is {now}"
        for cell in comparison.cells
        for change in cell.run.environment.changes
        for name, (before, now) in change.differences.items()
    ]
    yield from rate_warnings(comparison)
    if forced:
        yield "Training was resumed with other settings, or elsewhere.", forced
    lines = []
    for (label, trained_on, task), texts in fallen.items():
        after = f" trained on {trained_on}" if trained_on != task else ""
        seeds = len(comparison.of(label, trained_on))
        lines.append(f"{label}{after} on {task}, {len(texts)} of {seeds} seed{'s' * (seeds > 1)}; {texts[0]}")
    if lines:
        yield "Routing collapsed.", lines
    if alike:
        single = [
            f"{label} trained on {task}, {len(seeds)} of {len(comparison.of(label, task))} seeds: the examples that "
            "the router starts from do not show that some need another prompt than others"
            for (label, task), seeds in alike.items()
        ]
        yield "One expert serves all inputs.", single
    yield from incomparable(comparison)
    if comparison.left_out:
        counted = counted_states(comparison.left_out)
        yield "Not every cell is in the numbers.", [f"{counted}; they are listed under “Cells that are left out”."]


def _documents(comparison: Comparison, plan: Path) -> Iterator[tuple[str, str]]:
    """The plan, and each different machine or set of versions that cells ran on; their seeds differ by plan."""
    if plan.exists():
        yield plan.name, plan.read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for cell in comparison.cells:
        environment = cell.run.environment.model_dump(exclude=None if comparison.single else OF_A_CELL)
        found.setdefault(yaml_text(environment), []).append(f"{cell.label}/{cell.task}/seed-{cell.seed}")
    for text, cells in found.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        yield f"Versions, commit and hardware of {cells[0]}{more}", text
