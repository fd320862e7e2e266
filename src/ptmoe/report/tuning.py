"""The page of a search: its trials in a table, how each went, and the score against each setting."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ptmoe.compare.search import TunePlan
from ptmoe.compare.tuning import best_of
from ptmoe.report.figures import FAINT, HIGH, INK, plot
from ptmoe.report.gallery import Gallery, Section
from ptmoe.report.page import write_page
from ptmoe.report.table import Table
from ptmoe.runs.folders import BEST_FILE, TRIALS_FILE, TUNE_FILE
from ptmoe.runs.searches import TrialRecord


def write_tuning_report(folder: Path) -> Path | None:
    """Write `report.html`, `figures/*` and `tables/*` into a search's folder; None, and nothing, where no trial has a
    score.

    Raises:
        PtmoeError: the plan or a record is damaged.
    """
    plan, records = TunePlan.read(folder / TUNE_FILE), TrialRecord.read_lines(folder / TRIALS_FILE)
    scored = [record for record in records if record.state != "failed"]
    if not scored:
        return None
    best, fields = best_of(scored), list(plan.search)
    own = {field: getattr(plan, field, plan.method.get(field)) for field in fields}
    rows = sorted((_row(record, own) for record in records), key=lambda row: (row["steps"], row["score"]), reverse=True)
    table = Table(
        "trials",
        "Every trial",
        pd.DataFrame(rows, columns=["trial", *fields, "score", "steps", "state"], dtype=object),
        f"Score in percent on {plan.validation_examples:,} validation examples, which no trial trains on, the last "
        "that the trial has; a stopped trial’s is of fewer steps. A dash is a setting as it is given.",
        formats=dict.fromkeys(fields, _shown),
    )
    gallery, said = Gallery(folder / "figures", {}), {"best": f"trial {best.number}, {best.scores[-1][1]:.1f} %"}
    pictures = [gallery.picture("Score by step", curves, scored, best, alt=said)]
    for field in fields:
        points = [(row[field], row["score"], row["trial"]) for row in rows if row["state"] == "finished"]
        if points := [point for point in points if isinstance(point[0], int | float)]:
            pictures.append(gallery.picture(f"Score by {field}", scatter, field, points, best.number, alt=said))
    values = ", ".join(f"{name} {value}" for name, value in best.settings.items()) or "the settings as they are given"
    states = [sum(record.state == state for record in records) for state in ("finished", "stopped", "failed")]
    errors = [f"trial {record.number}: {record.error}" for record in records if record.error]
    far = "trained to their end" if best.state == "finished" else "came furthest"
    return write_page(
        folder,
        [Section("Trials", tables=[table], pictures=pictures)],
        title=f"Search {folder.resolve().name}",
        subtitle=f"{plan.method['name']} on {plan.task or plan.data} · base {plan.model} · {states[0]} trials finished,"
        f" {states[1]} stopped early, {states[2]} failed",
        summary=[
            f"Trial {best.number} has the highest score of those that {far}, {best.scores[-1][1]:.1f} %, with "
            f"{values}. It is the best of {len(scored)} on these examples, so its score flatters it: train with "
            f"{BEST_FILE}, and evaluate on the test split."
        ],
        warnings=[("Trials failed; the same command runs them again.", errors)] if errors else (),
        documents=[(name, (folder / name).read_text(encoding="utf-8")) for name in (BEST_FILE, TUNE_FILE)],
        command=f"ptmoe tune {shlex.quote((folder / TUNE_FILE).as_posix())}",
    )


def _row(record: TrialRecord, own: dict[str, Any]) -> dict[str, Any]:
    step, score = record.scores[-1] if record.scores else (0, float("-inf"))
    settings = {**own, **record.settings}
    return {"trial": record.number, **settings, "score": score, "steps": step, "state": record.state}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def curves(records: Sequence[TrialRecord], best: TrialRecord) -> Figure:
    """Each trial's validation score by step, the best one's strong."""
    figure, axes = plot("optimiser step", "validation score, %", height=3.1)
    for record in [*(record for record in records if record != best), best]:
        steps, scores = zip(*record.scores, strict=True)
        color, width = (HIGH, 2.4) if record == best else (INK, 0.9)
        alpha = 1.0 if record == best else 0.45
        axes.plot(steps, scores, color=color, linewidth=width, alpha=alpha, marker="o", markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color=FAINT)
    return figure


def scatter(field: str, points: Sequence[tuple[float, float, int]], best: int) -> Figure:
    """The finished trials' scores by one setting, on a logarithmic axis where it goes over more than a decade."""
    figure, axes = plot(field, "validation score, %", height=2.6)
    for value, score, number in points:
        axes.plot(value, score, "o", color=HIGH if number == best else INK, alpha=1.0 if number == best else 0.6)
    values = [point[0] for point in points]
    if min(values) > 0 and max(values) >= 10 * min(values):
        axes.set_xscale("log")
    axes.grid(axis="y", color=FAINT)
    return figure
