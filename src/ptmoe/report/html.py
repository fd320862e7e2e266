"""`report.html`: what a set of runs shows, as one file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from ptmoe.errors import PtmoeError
from ptmoe.report.figures import (
    learning_curves,
    loss_curve,
    score_by_domain,
)
from ptmoe.report.frame import Entry, Frame, decimal, rows, text, whole
from ptmoe.report.page import (
    Gallery,
    Section,
    Warned,
    environment_facts,
    facts,
    flat,
    write_page,
)
from ptmoe.report.routing_sections import collapse, routing_sections
from ptmoe.report.routing_tables import Routed
from ptmoe.report.runs import Evaluation, Run, labels, metric_of, tasks_of
from ptmoe.report.table import best_rows, percent, score_columns


def write_report(folder: str | Path, runs: Sequence[Run], title: str, command: str | None = None) -> Path:
    """Write `folder/report.html`, `folder/figures/*.{png,svg}` and `folder/tables/*`; returns the page's path.

    Args:
        folder: made if it is not there.
        runs: at least one; they are shown in this order.
        title: of the page.
        command: what repeats all of it; by default `ptmoe train RUN/config.yaml` for each trained run.

    Raises:
        PtmoeError: there are no runs.
    """
    if not runs:
        raise PtmoeError("no runs to report on: give finished run folders")
    folder = Path(folder)
    gallery = Gallery(folder / "figures")
    names = labels(runs)
    tasks = tasks_of(runs)
    collapses = [
        f"{label} on {task}: {said}"
        for label, run in zip(names, runs, strict=True)
        for task in run.evaluations
        if (said := collapse(run, task))
    ]
    return write_page(
        folder,
        title=title,
        summary=[summary(runs, task) for task in tasks] or ["No run was evaluated on a task."],
        warnings=[Warned("Routing collapsed.", collapses)] if collapses else [],
        sections=[
            *(Section(f"{metric_of(runs, task)} on {task}", tables=[_table(runs, names, task)]) for task in tasks),
            *_sections(runs, names, tasks, gallery),
        ],
        configuration=facts(names, [flat(run.config) for run in runs]),
        environment=facts(names, [environment_facts(run) for run in runs]),
        command=command or _commands(runs, folder),
    )


def summary(runs: Sequence[Run], task: str) -> str:
    """What the runs show on a task, in a few sentences that hold for any data."""
    found = [
        (label, run, run.evaluations[task])
        for label, run in zip(labels(runs), runs, strict=True)
        if task in run.evaluations
    ]
    found.sort(key=lambda one: -one[2].score)
    sizes = sorted({evaluation.examples for *_, evaluation in found})
    counted = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    label, run, first = found[0]
    text = f"On {task} ({counted} examples{'' if len(sizes) == 1 else ', not the same number for all runs'}) "
    text += f"{label} {_reaches(first)} with {_trained(run)}"
    if len(found) == 1:
        return f"{text}."
    level = percent(first.score) == percent(found[1][2].score)
    text += ", and no run reaches more. " if level else f", the most of {len(found)} runs. "
    others = [f"{name} {_reaches(evaluation)} with {_trained(other)}" for name, other, evaluation in found[1:]]
    return f"{text}{'; '.join(others)}. {_separation(label, first, found[1][0], found[1][2])}"


def _separation(label: str, first: Evaluation, next_label: str, second: Evaluation) -> str:
    high, low = first.score_interval, second.score_interval
    if high is None or low is None:
        return "Not every run has an interval, so how sure their order is cannot be said."
    if high[0] > low[1]:
        return f"The 95 % intervals of {label} and {next_label}, the next one, do not overlap."
    return f"The 95 % intervals of {label} and {next_label} overlap, so these examples do not tell the two apart."


def _interval(evaluation: Evaluation) -> str:
    interval = evaluation.score_interval
    around = f" [{percent(interval[0])}, {percent(interval[1])}]" if interval else ""
    return f"{percent(evaluation.score)} %{around}"


def _reaches(evaluation: Evaluation) -> str:
    what = _interval(evaluation)
    return f"answers {what} right" if evaluation.metric == "accuracy" else f"reaches {evaluation.metric} {what}"


def _trained(run: Run) -> str:
    count = run.result.trainable_parameters
    return f"{count:,} trained parameters" if count else "nothing trained"


def _table(runs: Sequence[Run], names: Sequence[str], task: str) -> Frame:
    columns = score_columns(runs, task)
    metric, *domains = columns
    lines = []
    for index, (label, run) in enumerate(zip(names, runs, strict=True)):
        evaluation = run.evaluations.get(task)
        interval = evaluation.score_interval if evaluation else None
        lines.append(
            [
                text(label),
                whole(run.result.trainable_parameters),
                *(
                    Entry(
                        values[index],
                        percent(values[index]),
                        interval if column == metric else None,
                        "examples",
                        index in best_rows(values),
                    )
                    for column, values in columns.items()
                ),
                decimal(run.result.train_seconds),
            ]
        )
    return Frame(
        f"{metric} on {task}",
        f"{metric} on {task}, %",
        ("method", "trainable parameters", metric, *domains, "seconds of training"),
        rows(lines),
        "Scores in percent. Bold: the highest of its column. In brackets: the 95 % interval over examples (bootstrap).",
    )


def _curve_table(runs: Sequence[Run], names: Sequence[str]) -> Frame:
    return Frame(
        "training logs",
        "What training logged",
        ("method", "step", "seconds", "loss", "learning rate", "gradient norm"),
        rows(
            [
                [
                    text(label),
                    whole(log.step),
                    decimal(log.seconds),
                    decimal(log.loss, 4),
                    decimal(log.learning_rate, 6),
                    decimal(log.grad_norm, 4),
                ]
                for label, run in zip(names, runs, strict=True)
                for log in run.logs
            ]
        ),
    )


def _sections(runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str], gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for."""
    picture = gallery.picture
    losses = [(label, curve) for label, run in zip(names, runs, strict=True) if (curve := loss_curve(run, "step"))]
    if losses:
        alt = "; ".join(f"{label}: loss from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for label, curve in losses)
        curves = [picture("loss by step", alt, lambda theme: learning_curves(runs, "step", theme))]
        if any(loss_curve(run, "seconds") for run in runs):
            curves.append(picture("loss by second", alt, lambda theme: learning_curves(runs, "seconds", theme)))
        yield Section(
            "Learning curves",
            "Cross-entropy on the supervised tokens, in nats, as training logged it.",
            pictures=curves,
            numbers=[_curve_table(runs, names)],
        )
    if tasks:
        yield Section(
            "Score by domain",
            "Bars in percent; the line on “all” is the 95 % interval.",
            pictures=[
                picture(
                    f"{metric_of(runs, task)} on {task}",
                    summary(runs, task),
                    lambda theme, task=task: score_by_domain(runs, task, theme),  # type: ignore[misc]
                )
                for task in tasks
            ],
        )
    routed = [
        Routed(label, str(run.config.get("task") or run.config.get("data") or "–"), run.environment.seed, run, label)
        for label, run in zip(names, runs, strict=True)
    ]
    yield from routing_sections(routed, routed, gallery)


def _commands(runs: Sequence[Run], folder: Path) -> str:
    """One line for each trained run; its folder as seen from the report where it lies below it."""
    lines = []
    for run in runs:
        if run.method == "base":
            continue
        inside = run.folder.resolve().is_relative_to(folder.resolve())
        place = run.folder.resolve().relative_to(folder.resolve()) if inside else run.folder
        lines.append(f"ptmoe train {shlex.quote((place / 'config.yaml').as_posix())}")
    return "\n".join(lines)
