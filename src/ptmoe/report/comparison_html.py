"""`COMPARISON/report.html`: all that a comparison found, as one file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ptmoe.report.comparison import Comparison, read_comparison
from ptmoe.report.comparison_figures import (
    Curve,
    curve_of,
    learning_curves,
    score_by_parameters,
    scores_by_domain,
    styles,
)
from ptmoe.report.comparison_tables import (
    cell_table,
    cost_table,
    curve_table,
    domain_rows,
    domain_table,
    left_out_table,
    p_in_words,
    paired_table,
    score_table,
)
from ptmoe.report.page import (
    Facts,
    Gallery,
    Picture,
    Section,
    Warned,
    environment_facts,
    facts,
    flat,
    listed,
    write_page,
)
from ptmoe.report.published import published_for
from ptmoe.report.results import ALPHA, Column, Row, Score, Scoreboard, scoreboards
from ptmoe.report.routing_sections import collapse, routing_sections
from ptmoe.report.routing_tables import Routed
from ptmoe.report.runs import domains_of
from ptmoe.report.table import metric_name


def write_comparison_report(folder: str | Path, command: str | None = None) -> Path:
    """Write `report.html`, `figures/*.{png,svg}` and `tables/*.{csv,json,md,tex}` into a comparison's folder.

    Args:
        folder: as `ptmoe compare` writes it (`ptmoe.report.comparison`).
        command: what repeats all of it; by default `ptmoe compare FOLDER/comparison.yaml`.

    Returns:
        The page's path.

    Raises:
        PtmoeError: no cell is finished, or the plan is damaged.
    """
    comparison = read_comparison(folder)
    boards = scoreboards(comparison)
    gallery = Gallery(comparison.folder / "figures")
    sections = [
        *_score_sections(comparison, boards, gallery),
        *_domain_section(comparison, boards, gallery),
        *_curve_section(comparison, gallery),
        *_routing_sections(comparison, gallery),
        *_left_out_section(comparison),
        Section(
            "Every cell",
            "What all numbers above come from: each finished cell’s scores as its files hold them, and what training "
            "took.",
            tables=[cost_table(comparison)],
            numbers=[cell_table(comparison)],
        ),
    ]
    return write_page(
        comparison.folder,
        title=str(comparison.plan.get("title") or f"Comparison {comparison.folder.resolve().name}"),
        subtitle=_extent(comparison),
        summary=[_in_words(board) for board in boards if board.ranks],
        warnings=[*_collapses(comparison), *_gaps(comparison)],
        sections=sections,
        configuration=facts(["comparison.yaml"], [flat(comparison.plan)]),
        environment=_environments(comparison),
        command=command or f"ptmoe compare {shlex.quote((comparison.folder / 'comparison.yaml').as_posix())}",
    )


def _extent(comparison: Comparison) -> str:
    """How much of what is compared."""
    bases = list(dict.fromkeys(str(cell.run.config.get("model", "nano")) for cell in comparison.cells))
    tasks = list(dict.fromkeys(cell.task for cell in comparison.cells))
    seeds = comparison.seeds
    parts = [
        f"base {listed(bases)}",
        _counted(len(comparison.labels), "method"),
        f"trained on {listed(tasks) if len(tasks) < 4 else _counted(len(tasks), 'task')}",
        f"{_counted(len(seeds), 'seed')}",
        f"{_counted(len(comparison.cells), 'finished cell')}",
    ]
    return " · ".join(parts)


def _in_words(board: Scoreboard) -> str:
    """What a table shows, in sentences that hold for any data."""
    ranking = [(row, row.average) for row in board.ranking if row.average]
    metric = metric_name(board.metric)
    where = f"on {board.columns[0].name}" if len(board.columns) == 1 else f"on average over {len(board.columns)} tasks"
    if not ranking:
        return f"No method has a finished cell for each task, so no average {metric} can be compared."
    row, score = ranking[0]
    said = f"{row.label} reaches {metric} {_with_interval(score)} {where} with {_trained(row)}"
    if len(ranking) == 1:
        return f"{said}."
    other, second = ranking[1]
    if f"{score.mean:.1f}" == f"{second.mean:.1f}":
        said += f", level with {other.label}."
    else:
        said += (
            f", the most of {len(ranking)}; {other.label} follows with {_with_interval(second)} and {_trained(other)}."
        )
    tests = board.paired
    test = None
    if tests is not None:
        test = tests.average or (tests.tasks[0] if len(board.columns) == len(tests.tasks) == 1 else None)
    if test is None:
        return f"{said} The two were not tested on the same examples."
    low, high = test.test.interval
    verdict = "more than chance explains" if test.test.p < ALPHA else "which chance explains as well"
    return (
        f"{said} On the same {test.examples:,} examples they differ by {test.test.difference:.1f} points [{low:.1f}, "
        f"{high:.1f}], {verdict} (p {_equal(p_in_words(test.test.p))})."
    )


def _equal(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def _with_interval(score: Score) -> str:
    if score.interval is None:
        return f"{score.mean:.1f} %"
    low, high = score.interval
    if score.over == "seeds":
        return f"{score.mean:.1f} ± {(high - low) / 2:.1f} % ({len(score.seeds)} seeds)"
    return f"{score.mean:.1f} % [{low:.1f}, {high:.1f}]"


def _trained(row: Row) -> str:
    return f"{row.trainable_parameters:,} trained parameters" if row.trainable_parameters else "nothing trained"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _collapses(comparison: Comparison) -> Iterator[Warned]:
    """One line for each label and task, with the first seed whose routing collapsed."""
    lines = []
    for label in comparison.labels:
        for column in dict.fromkeys((cell.task, task) for cell in comparison.of(label) for task in cell.eval_tasks):
            trained_on, task = column
            cells = comparison.of(label, trained_on)
            fallen = [(cell.seed, said) for cell in cells if (said := collapse(cell.run, task))]
            if fallen:
                after = f" trained on {trained_on}" if trained_on != task else ""
                of = f"{len(fallen)} of {_counted(len(cells), 'seed')}"
                lines.append(f"{label}{after} on {task}, {of}; with seed {fallen[0][0]} {fallen[0][1]}")
    if lines:
        yield Warned("Routing collapsed.", lines)


def _gaps(comparison: Comparison) -> Iterator[Warned]:
    if comparison.left_out:
        states = [one.state for one in comparison.left_out]
        counted = listed([f"{states.count(state)} {state}" for state in dict.fromkeys(states)])
        yield Warned(
            "Not every cell is in the numbers.", [f"{counted}; they are listed under “Cells that are left out”."]
        )


def _score_sections(comparison: Comparison, boards: Sequence[Scoreboard], gallery: Gallery) -> Iterator[Section]:
    for board in boards:
        tables = [score_table(comparison, board, published_for(comparison, board))]
        if board.paired and (board.paired.tasks or board.paired.notes):
            tables.append(paired_table(board.paired, board.metric))
        metric = metric_name(board.metric)
        where = f" on {board.columns[0].name}" if len(board.columns) == 1 else ""
        yield Section(f"{metric}{where}", tables=tables)
    ranked = [board for board in boards if board.ranks and board.ranking]
    if ranked:
        yield Section(
            "Score against trainable parameters",
            "The average over tasks with its 95 % interval. The dashed line joins the methods that none beats with as "
            "few parameters or fewer; a dotted line is a method that trains nothing.",
            pictures=[
                gallery.picture(
                    f"average {metric_name(board.metric)} by trainable parameters"
                    if len(board.columns) > 1
                    else f"{metric_name(board.metric)} on {board.columns[0].name} by trainable parameters",
                    "; ".join(
                        f"{row.label}: {row.average.mean:.1f} % with {_trained(row)}"
                        for row in board.rows
                        if row.average
                    ),
                    lambda theme, board=board: score_by_parameters(  # type: ignore[misc]
                        board.rows, board.metric, styles(comparison, theme), theme
                    ),
                )
                for board in ranked
            ],
        )


def _left_out_section(comparison: Comparison) -> Iterator[Section]:
    if comparison.left_out:
        yield Section(
            "Cells that are left out",
            "Failed, damaged, unfinished, or not started of the grid of all methods, tasks and seeds that anything is "
            "known of.",
            tables=[left_out_table(comparison)],
        )


def _domain_section(comparison: Comparison, boards: Sequence[Scoreboard], gallery: Gallery) -> Iterator[Section]:
    runs = [cell.run for cell in comparison.cells]
    parts: list[tuple[Column, list[str]]] = [
        (column, domains)
        for board in boards
        if board.ranks
        for column in board.columns
        if len(domains := domains_of(runs, column.task)) > 1
    ]
    pictures, tables = [], []
    for column, domains in parts:
        scores = domain_rows(comparison, column, domains)
        if not column.mean_of_domains:
            scores.pop("mean of domains", None)  # the table has it
        overall = len(scores) - len(domains)
        tables.append(domain_table(comparison, column, domains))
        pictures.append(
            gallery.picture(
                f"{metric_name(column.metric)} on {column.name} by domain",
                "; ".join(
                    f"{name}: " + ", ".join(f"{label} {score.mean:.1f}" for label, score in row.items() if score)
                    for name, row in scores.items()
                ),
                lambda theme, scores=scores, column=column, overall=overall: scores_by_domain(  # type: ignore[misc]
                    scores, column.metric, styles(comparison, theme), theme, overall
                ),
            )
        )
    if parts:
        yield Section(
            "By domain",
            "Means over seeds. The lines are 95 % intervals; a single seed has none within a domain.",
            pictures=pictures,
            folded=tables,
        )


def _curve_section(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    pictures: list[Picture] = []
    points: list[tuple[str, str, str, float, float, float, float, int]] = []
    for task in dict.fromkeys(cell.task for cell in comparison.cells):
        for against in ("step", "seconds"):
            curves = _curves(comparison, task, "step" if against == "step" else "seconds")
            if not curves:
                continue
            points += [
                (curve.label, task, against, float(at), float(mean), float(low), float(high), curve.seeds)
                for curve in curves
                for at, mean, low, high in zip(curve.at, curve.mean, curve.low, curve.high, strict=True)
            ]
            pictures.append(_curve_picture(comparison, curves, task, against, gallery))
    if pictures:
        yield Section(
            "Learning curves",
            "Cross-entropy on the supervised tokens, in nats, as training logged it: the mean over seeds, and a band "
            "from the lowest seed to the highest. A second is the mean of the seeds’ at the same step.",
            pictures=pictures,
            numbers=[curve_table(points)],
        )


def _curves(comparison: Comparison, task: str, against: Literal["step", "seconds"]) -> list[Curve]:
    found = [curve_of(label, comparison.of(label, task), against) for label in comparison.labels]
    return [curve for curve in found if curve is not None]


def _curve_picture(
    comparison: Comparison, curves: Sequence[Curve], task: str, against: str, gallery: Gallery
) -> Picture:
    by: Literal["step", "seconds"] = "step" if against == "step" else "seconds"
    return gallery.picture(
        f"loss by {'step' if by == 'step' else 'second'} on {task}",
        "; ".join(f"{curve.label}: loss from {curve.mean[0]:.3f} to {curve.mean[-1]:.3f}" for curve in curves),
        lambda theme: learning_curves(curves, by, styles(comparison, theme), theme),
    )


def _routing_sections(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    several_tasks = len({cell.task for cell in comparison.cells}) > 1
    runs = [
        Routed(
            cell.label,
            cell.task,
            cell.seed,
            cell.run,
            f"{cell.label} trained on {cell.task}" if several_tasks else cell.label,
            len(comparison.of(cell.label, cell.task)) > 1,
        )
        for cell in comparison.cells
    ]
    first: dict[tuple[str, str], Routed] = {}
    for one in runs:
        first.setdefault((one.label, one.trained_on), one)
    yield from routing_sections(runs, list(first.values()), gallery)


def _environments(comparison: Comparison) -> Facts:
    """Seeds differ by plan; what else the cells ran on is a column for each different machine or set of versions."""
    different: dict[str, tuple[list[str], dict[str, object]]] = {}
    for cell in comparison.cells:
        known = {name: value for name, value in environment_facts(cell.run).items() if name != "seed"}
        names, _ = different.setdefault(repr(known), ([], known))
        names.append(f"{cell.label}/{cell.task}/seed-{cell.seed}")
    columns = [
        names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more" for names, _ in different.values()
    ]
    if len(different) == 1:
        columns = ["all cells"]
    return facts(columns, [known for _, known in different.values()])
