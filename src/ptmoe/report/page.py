"""`report.html`: what a comparison or a run found, as one file that needs nothing else."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptmoe.report.sections import Gallery, Section, sections, trained_text  # isort: skip  it says what to install

from jinja2 import Environment, StrictUndefined

from ptmoe.report.comparison import Comparison, counted_states, read_comparison, single_run
from ptmoe.report.results import ALPHA, AVERAGE, Board, Score, boards
from ptmoe.report.table import file_name, interval_text, metric_name
from ptmoe.report.tables import p_text
from ptmoe.runs.folders import CONFIG_FILE, PLAN_FILE, Run, is_run
from ptmoe.runs.records import EvaluationSummary

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
    gallery = Gallery(folder / "figures", {cell.label: cell.method for cell in comparison.cells})
    shown = list(_own_files(sections(comparison, found, gallery)))
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for section in shown:
        for table in (*section.tables, *section.folded, *section.numbers):
            for name, (_, text) in table.files().items():
                (folder / "tables" / name).write_text(text, encoding="utf-8", newline="")
    verb, file, title = "compare", PLAN_FILE, f"Comparison {folder.resolve().name}"
    if comparison.single:
        verb, file, title = "train", CONFIG_FILE, f"{first.label} on {first.task}"
    if command is None:
        trained = any(cell.trainable_parameters for cell in comparison.cells)
        command = f"ptmoe {verb} {shlex.quote((folder / file).as_posix())}" if trained else ""
    text = files("ptmoe.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(text).render(
        parts=lambda name: re.findall(rf"[^\W_]{{1,{LONGEST_PART}}}[\W_]*|[\W_]+", name),
        title=str(comparison.plan.get("title") or title),
        subtitle=_extent(comparison),
        summary=[_in_words(comparison, board) for board in found if board.ranks] or ["Nothing was evaluated."],
        warnings=list(_warnings(comparison)),
        sections=shown,
        facts=[
            ("Configuration", *facts([file], [flat(comparison.plan)])),
            ("Versions, commit and hardware", *_environments(comparison)),
        ],
        command=command,
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _own_files(shown: Iterable[Section]) -> Iterator[Section]:
    """The same sections, their tables under names of files that no other table of the page has."""
    used: set[str] = set()
    for section in shown:
        tables, folded, numbers = (
            [replace(table, name=file_name(table.name, used)) for table in part]
            for part in (section.tables, section.folded, section.numbers)
        )
        yield replace(section, tables=tables, folded=folded, numbers=numbers)


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
