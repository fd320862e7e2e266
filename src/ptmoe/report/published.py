"""PT-MoE's published figures (`paper.json`, from arXiv:2505.09519), beside ours where the tasks are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptmoe.report.comparison import Comparison
    from ptmoe.report.results import Board


@dataclass(frozen=True)
class Published:
    """Rows of the paper for a table of ours.

    Attributes:
        source: the paper and the base that it tuned.
        rows: by method, its count of parameters as printed, a score in percent for each column of the table, None where
            the paper has none, and the plain mean over the columns, None where one lacks.
        notes: in what its figures differ from ours.
    """

    source: str
    rows: dict[str, tuple[str, list[float | None], float | None]]
    notes: tuple[str, ...]


@cache
def paper() -> dict[str, Any]:
    """The published figures, as they are shipped."""
    facts: dict[str, Any] = json.loads(files("ptmoe.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return facts


def source() -> str:
    return f"published: {paper()['source']}, {paper()['base']}"


def published_for(comparison: Comparison, board: Board) -> Published | None:
    """What the paper has for a table's tasks; None where it has none of them."""
    facts = paper()
    table = facts["tables"].get(board.metric, {"rows": {"FT": {"scores": {}}}})
    shared = [column for column in board.columns if column.task in table["rows"]["FT"]["scores"]]
    if not shared:
        return None
    rows = {}
    for method, row in table["rows"].items():
        scores = [row["scores"].get(column.task) for column in board.columns]
        average = None if None in scores else sum(scores) / len(scores)
        rows[method] = (facts["parameters"][method], scores, average)
    notes = []
    bases = comparison.bases
    if not all(base.rstrip("/").endswith(facts["base"]) for base in bases):
        notes.append(f"another base: the paper tuned {facts['base']}, here it is {', '.join(bases)}")
    trained = sorted({column.trained_on for column in shared} - {table["trained_on"]})
    if trained:
        notes.append(f"other training data: the paper trained on {table['trained_on']}, here on {', '.join(trained)}")
    notes += _other_examples(comparison, [column.task for column in shared])
    return Published(source(), rows, tuple(notes))


def _other_examples(comparison: Comparison, tasks: Sequence[str]) -> list[str]:
    published, differ = paper()["examples"], []
    for task in dict.fromkeys(tasks):
        ours = sorted(
            {cell.run.evaluations[task].examples for cell in comparison.cells if task in cell.run.evaluations}
        )
        if task in published and ours != [published[task]]:
            differ.append(f"{task} has {published[task]:,} there, {' or '.join(f'{n:,}' for n in ours)} here")
    return [f"other test examples: {'; '.join(differ)}"] if differ else []
