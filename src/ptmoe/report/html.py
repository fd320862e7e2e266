"""`report.html`: what a set of runs shows, as one file that needs nothing else, and its figures as PNG files."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.report.figures import (
    DARK,
    LIGHT,
    Theme,
    learning_curves,
    loss_curve,
    routing_heat_map,
    routing_over_training,
    score_by_domain,
    similarity_heat_map,
)
from ptmoe.report.runs import Evaluation, Run, labels, metric_of, tasks_of
from ptmoe.report.table import best_rows, percent, score_columns

try:
    from jinja2 import Environment, StrictUndefined, Template
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise PtmoeError("a report needs jinja2: pip install 'ptmoe[report]'") from None

PNG_DPI = 200


@dataclass(frozen=True)
class Picture:
    """A figure in both colour modes, as data URIs; `alt` says what it shows to those who do not see it."""

    title: str
    note: str
    alt: str
    light: str
    dark: str


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class TaskTable:
    """One task's scores, a row for each run; `domains` gives each domain's number of examples, where all agree."""

    task: str
    metric: str
    domains: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Facts:
    """Named values of runs: a column for each run, or one for all where they agree on everything."""

    columns: list[str]
    rows: list[tuple[str, list[str], bool]]  # name, values, whether the runs differ


def write_report(folder: str | Path, runs: Sequence[Run], title: str, command: str | None = None) -> Path:
    """Write `folder/report.html` and `folder/figures/*.png`; returns the page's path.

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
    images = folder / "figures"
    images.mkdir(parents=True, exist_ok=True)
    names = labels(runs)
    tasks = tasks_of(runs)
    page = _template().render(
        title=title,
        summary=[summary(runs, task) for task in tasks] or ["No run was evaluated on a task."],
        warnings=list(_collapse_warnings(runs, names)),
        tables=[_table(runs, names, task) for task in tasks],
        sections=list(_sections(runs, names, tasks, images)),
        configuration=_facts(names, [_flat(run.config) for run in runs]),
        environment=_facts(names, [_environment(run) for run in runs]),
        command=command or _commands(runs, folder),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


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


def _collapse_warnings(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    for label, run in zip(names, runs, strict=True):
        for task in run.evaluations:
            expert = run.collapsed_expert(task)
            if expert is None:
                continue
            shares = run.overall_shares(task)
            takes = "of the inputs" if run.selective else "of the gate"
            method = run.config["method"]
            off = [key for key in ("router_standardize", "routing_anneal") if method.get(key) is False]
            guard = f" Off in this run, and meant against it: {', '.join(off)}." if off else ""
            yield (
                f"{label} on {task}: expert {expert} takes {percent(100 * shares[expert])} % {takes}, the other "
                f"{len(shares) - 1} next to nothing.{guard}"
            )


def _table(runs: Sequence[Run], names: Sequence[str], task: str) -> TaskTable:
    columns = score_columns(runs, task)
    metric, *domains = columns
    rows = []
    for index, (label, run) in enumerate(zip(names, runs, strict=True)):
        evaluation = run.evaluations.get(task)
        interval = evaluation.score_interval if evaluation else None
        cells = [Cell(f"{run.result.trainable_parameters:,}")]
        for column, values in columns.items():
            note = f"[{percent(interval[0])}, {percent(interval[1])}]" if interval and column == metric else ""
            cells.append(Cell(percent(values[index]), index in best_rows(values), note))
        cells.append(Cell(f"{run.result.train_seconds:,.1f}"))
        rows.append((label, cells))
    return TaskTable(task, metric, domains, rows)


def _sections(
    runs: Sequence[Run], names: Sequence[str], tasks: Sequence[str], images: Path
) -> Iterator[tuple[str, str, list[Picture]]]:
    """Heading, explanation and pictures of each part that there is data for."""
    used: set[str] = set()

    def picture(title: str, alt: str, draw: Callable[[Theme], Figure], note: str = "") -> Picture:
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-.").lower() or "figure"
        name = stem
        while name in used:
            name = f"{stem}-{len(used)}"
        used.add(name)
        light = draw(LIGHT)
        light.savefig(images / f"{name}.png", dpi=PNG_DPI)
        return Picture(title, note, alt, _data_uri(light), _data_uri(draw(DARK)))

    losses = [(label, curve) for label, run in zip(names, runs, strict=True) if (curve := loss_curve(run, "step"))]
    if losses:
        alt = "; ".join(f"{label}: loss from {curve[0][1]:.3f} to {curve[-1][1]:.3f}" for label, curve in losses)
        curves = [picture("loss by step", alt, lambda theme: learning_curves(runs, "step", theme))]
        if any(loss_curve(run, "seconds") for run in runs):
            curves.append(picture("loss by second", alt, lambda theme: learning_curves(runs, "seconds", theme)))
        yield "Learning curves", "Cross-entropy on the supervised tokens, in nats, as training logged it.", curves
    if tasks:
        yield (
            "Score by domain",
            "Bars in percent; the line on “all” is the 95 % interval.",
            [
                picture(
                    f"{metric_of(runs, task)} on {task}",
                    summary(runs, task),
                    lambda theme, task=task: score_by_domain(runs, task, theme),  # type: ignore[misc]
                )
                for task in tasks
            ],
        )
    routed = [
        (label, run, task, routing)
        for label, run in zip(names, runs, strict=True)
        for task, evaluation in run.evaluations.items()
        if (routing := evaluation.routing) is not None
    ]
    if routed:
        yield (
            "Routing: which expert each domain went to",
            "The share of a domain’s inputs that each expert takes (of the gate, for a method that mixes all experts). "
            "Mutual information is 0 where the expert says nothing about the domain.",
            [
                picture(
                    f"routing of {label} on {task}",
                    _shares_in_words(run.shares(task)),
                    lambda theme, run=run, task=task: routing_heat_map(run.shares(task), theme),  # type: ignore[misc]
                    f"mutual information {routing.mutual_information:.2f} nats, entropy {routing.entropy:.2f} nats",
                )
                for label, run, task, routing in routed
            ],
        )
    # The prompts do not depend on the task: one figure for each run.
    alike = {label: routing.prompt_similarity for label, _, _, routing in routed if routing.prompt_similarity}
    if alike:
        yield (
            "Similarity of the experts’ prompts",
            "Cosine of every pair; 1 is the same direction, 0 none in common.",
            [
                picture(
                    f"prompt similarity of {label}",
                    _similarity_in_words(rows),
                    lambda theme, rows=rows: similarity_heat_map(rows, theme),  # type: ignore[misc]
                )
                for label, rows in alike.items()
            ],
        )
    logged = [
        (label, run)
        for label, run in zip(names, runs, strict=True)
        if any(log.step is not None and log.expert_use for log in run.logs)
    ]
    if logged:
        yield (
            "Routing over training",
            "Top: the share of the training inputs that each expert took. Bottom: the router’s confidence, the mean of "
            "its largest probability, and how far the gate has hardened from all experts to the chosen one.",
            [
                picture(
                    f"routing of {label} over training",
                    f"expert use and routing confidence of {label} by optimiser step",
                    lambda theme, run=run: routing_over_training(run, theme),  # type: ignore[misc]
                )
                for label, run in logged
            ],
        )


def _shares_in_words(shares: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(
        f"{domain or 'all'}: " + ", ".join(f"expert {expert} {share:.0%}" for expert, share in enumerate(row))
        for domain, row in shares.items()
    )


def _similarity_in_words(rows: Sequence[Sequence[float]]) -> str:
    return "; ".join(f"expert {index}: " + ", ".join(f"{value:.2f}" for value in row) for index, row in enumerate(rows))


def _data_uri(figure: Figure) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()


def _facts(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> Facts:
    keys = list(dict.fromkeys(key for run in runs for key in run))
    rows = []
    for key in keys:
        values = [_written(run[key]) if key in run else "–" for run in runs]
        rows.append((key, values, len(set(values)) > 1))
    if any(differ for *_, differ in rows):
        return Facts(list(names), rows)
    return Facts(["all runs" if len(runs) > 1 else names[0]], [(key, values[:1], False) for key, values, _ in rows])


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _environment(run: Run) -> dict[str, Any]:
    environment = run.environment
    return {
        "commit": environment.commit or "not a checkout",
        "seed": environment.seed if environment.seed is not None else run.config.get("seed"),
        **environment.hardware,
        **{name: version or "not installed" for name, version in environment.versions.items()},
    }


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)


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


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("ptmoe.report").joinpath("report.html.j2").read_text(encoding="utf-8"))
