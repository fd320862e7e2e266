"""What each method costs to keep, to train and to use, and how its learning rate was chosen."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pandas as pd

from ptmoe.methods import METHODS
from ptmoe.report.comparison import Comparison
from ptmoe.report.gallery import Section
from ptmoe.report.table import Table, decimals
from ptmoe.runs.searches import RateSearch
from ptmoe.settings import OF_PEFT

MEASURED = {
    "adapter bytes": "of the adapter’s tensors in their file",
    "seconds a step": "from the first line of the log to the last",
    "peak memory": "the most that the training held: allocated on a GPU; on a CPU resident of the process, with the "
    "libraries and the base",
    "forgetting": "how much the loss of the base’s own skill rises with the adapter, in nats a token: on nano of its "
    "skills with their instructions, elsewhere of the lines of text that --forgetting named",
}


def cost_sections(comparison: Comparison) -> Iterator[Section]:
    """A row for each label, means over its cells."""
    found = pd.DataFrame([cell.facts() for cell in comparison.cells]).groupby("label", sort=False)
    columns = {
        "trainable parameters": ("trainable parameters", "first"),
        **{name: (name, "mean") for name in MEASURED},
        "optimiser steps": ("steps", "mean"),
        "seconds of training": ("seconds of training", "mean"),
        "cells": ("label", "size"),
    }
    frame = found.agg(**columns).astype(object).rename_axis("method").reset_index()
    frame = frame.where(frame.notna(), None)
    frame["rows share a batch"] = [_shares(name) for name in comparison.methods.values()]
    known = [name for name in MEASURED if frame[name].notna().any()]
    notes = [f"{name}: {what}." for name, what in MEASURED.items() if name in known]
    notes.append(
        "Rows share a batch: whether rows of one batch may each have another adapter of this kind. Methods that change "
        "the base’s layers, or fill the cache of all rows, cannot. Means over a method’s cells."
    )
    formats = {"adapter bytes": bytes_text, "peak memory": bytes_text, "seconds a step": decimals(3)}
    formats |= {"forgetting": "{:+.3f}".format, "optimiser steps": decimals(0)}
    table = Table(
        "cost",
        "What each method costs",
        frame.drop(columns=[name for name in MEASURED if name not in known]),
        " ".join(note[0].upper() + note[1:] for note in notes),
        hints=list(found["size"].first()),
        formats=formats,
    )
    yield Section("Cost", "What an adapter takes to keep, to train and to use.", [table])


def _shares(method: str) -> str:
    if method.startswith(OF_PEFT):
        return "no"
    config = METHODS.get(method)  # None for the untouched base, whose rows any adapter’s may stand beside
    return "yes" if config is None or config.shares_batch() else "no"


def bytes_text(value: float) -> str:
    """`15.4 kB`, in powers of a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    raise AssertionError


def rate_sections(comparison: Comparison) -> Iterator[Section]:
    """The grid of each search for a learning rate with the mean score of each rate, and the one that was chosen."""
    if not comparison.searches:
        return
    several = len({search.task for search in comparison.searches}) > 1
    rows: list[dict[str, Any]] = []
    for search in comparison.searches:
        own = {"method": search.label, **({"trained on": search.task} if several else {})}
        grid = {f"rate {_factor(search, rate)}": search.means.get(rate) for rate in search.rates}
        rows.append({**own, "given rate": search.given, "chosen": search.chosen, **grid})
    trials = []
    for search, trial in [(each, trial) for each in comparison.searches for trial in each.trials]:
        steps, score = trial.scores[-1] if trial.scores else (None, None)
        of = {"method": search.label, "trained on": search.task, **trial.settings}
        found = {"score": score, "steps": steps, "state": trial.state, "scored on": search.split, "why": trial.error}
        trials.append(of | found)
    first = comparison.searches[0]
    splits = {search.split for search in comparison.searches}
    scored = {"validation": "the validation split", "train": "the first of the training split, left out of the trials"}
    where = " or ".join(text for split, text in scored.items() if split in splits)
    lengths = sorted({trial["steps"] for trial in trials if trial["steps"] is not None})
    note = (
        f"Mean score in percent of {len(first.seeds)} seeds after {' or '.join(f'{n:,}' for n in lengths) or 'no'} "
        f"steps, on at most {first.examples:,} examples of {where}; no test example was read. × 3 is three times the "
        "given rate, which is the method’s own where the plan names none. A dash is a rate with which some seed "
        "diverged or failed. The best mean was chosen for the cells, so it flatters itself: the scores above are of "
        "the test split."
    )
    yield Section(
        "Learning rates",
        "Every method was tried at several learning rates before its cells were run.",
        [
            Table("learning rates", "Score by learning rate", pd.DataFrame(rows, dtype=object), note, formats=_RATES),
            Table("search", "Every trial of the search", pd.DataFrame(trials, dtype=object), place="download"),
        ],
    )


_RATES = dict.fromkeys(("given rate", "chosen"), "{:g}".format)


def _factor(search: RateSearch, rate: float) -> str:
    """`÷ 9`; rates are rounded to three digits, so their ratios are, too."""
    ratio = Fraction(rate / search.given).limit_denominator(30)
    simple = abs(float(ratio) * search.given / rate - 1) < 0.006
    if simple and 1 in (ratio.numerator, ratio.denominator):
        return f"× {ratio}" if ratio >= 1 else f"÷ {ratio.denominator}"
    return f"× {rate / search.given:.3g}"


def rate_warnings(comparison: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Learning rates that were chosen at the edge of their grids."""
    lines = [
        f"{search.label} on {search.task}: {search.chosen:g}, the {search.edge} of {search.rates[0]:g} to "
        f"{search.rates[-1]:g}"
        for search in comparison.searches
        if search.edge is not None
    ]
    if lines:
        yield "A learning rate was chosen at the edge of its grid, and a better one may lie beyond.", lines
