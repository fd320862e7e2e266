"""PT-MoE's published figures (`paper.json`, from arXiv:2505.09519), beside ours where the tasks are the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptmoe.report.comparison import Comparison
    from ptmoe.report.results import Scoreboard

BY_DOMAIN_MEAN = ("svamp",)  # the paper's figure is the plain mean of its four types


@dataclass(frozen=True)
class PublishedRow:
    """A method's published scores in percent, one for each column of a table, None where the paper has none.

    `average` is the plain mean over the table's columns, None where one lacks.
    """

    method: str
    parameters: str
    scores: tuple[float | None, ...]
    average: float | None


@dataclass(frozen=True)
class Published:
    """Rows of the paper for a table of ours.

    Attributes:
        source: the paper.
        base: the model that it tuned.
        same_base: whether all our cells tuned that, too.
        rows: its methods.
        notes: in what else its figures differ from ours.
    """

    source: str
    base: str
    same_base: bool
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...]


@cache
def paper() -> dict[str, Any]:
    """The facts, as they are shipped."""
    facts: dict[str, Any] = json.loads(files("ptmoe.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return facts


def published_for(comparison: Comparison, board: Scoreboard) -> Published | None:
    """What the paper says of a table's tasks; None where it has none of them."""
    facts = paper()
    table = facts["tables"].get(board.metric)
    known = set(table["rows"]["FT"]["scores"]) if table else set()
    shared = [column for column in board.columns if column.task in known]
    if not shared:
        return None
    rows = []
    for method, row in table["rows"].items():
        scores = tuple(row["scores"].get(column.task) for column in board.columns)
        found = [score for score in scores if score is not None]
        average = sum(found) / len(found) if len(found) == len(scores) else None
        rows.append(PublishedRow(method, facts["parameters"][method], scores, average))
    bases = list(dict.fromkeys(str(cell.run.config.get("model", "nano")) for cell in comparison.cells))
    same_base = all(base.rstrip("/").endswith(facts["base"]) for base in bases)
    notes = []
    if not same_base:
        notes.append(f"another base: the paper tuned {facts['base']}, here it is {', '.join(bases)}")
    trained = sorted({column.trained_on for column in shared} - {table["trained_on"]})
    if trained:
        notes.append(f"other training data: the paper trained on {table['trained_on']}, here on {', '.join(trained)}")
    notes += _other_examples(comparison, [column.task for column in shared], facts["examples"])
    return Published(facts["source"], facts["base"], same_base, tuple(rows), tuple(notes))


def _other_examples(comparison: Comparison, tasks: Sequence[str], published: Mapping[str, int]) -> list[str]:
    differ = []
    for task in dict.fromkeys(tasks):
        ours = sorted({e.examples for cell in comparison.cells if (e := cell.run.evaluations.get(task))})
        if task in published and ours != [published[task]]:
            differ.append(f"{task} has {published[task]:,} there, {' or '.join(f'{n:,}' for n in ours)} here")
    return [f"other test examples: {'; '.join(differ)}"] if differ else []
