"""RESULTS.md's part on serving, from what `python -m benchmarks.serve` recorded. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.report import Figure, table

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
Rounds = dict[str, list[float]]  # each system's figures


@dataclass(frozen=True)
class Goal:
    """A bound for a system's figure: for its ratio to another's, its difference from it, or for itself."""

    system: str
    kind: Literal["at least", "at most", "more by at most"]
    bound: float
    over: str | None = None

    def figure(self, rounds: Rounds) -> Figure:
        """Taken round by round."""
        values = rounds[self.system]
        if self.over is None:
            return Figure.of(values)
        pairs = list(zip(values, rounds[self.over], strict=True))
        if self.kind == "more by at most":
            return Figure.of(one - other for one, other in pairs)
        return Figure.of(one / other for one, other in pairs)

    def is_met(self, figure: Figure) -> bool:
        """By the median."""
        return figure.median >= self.bound if self.kind == "at least" else figure.median <= self.bound

    def text(self, unit: str) -> str:
        sign = "≥" if self.kind == "at least" else "≤"
        if self.over is None:
            return f"{self.system} {sign} {self.bound:g}"
        if self.kind == "more by at most":
            return f"{self.system} − {self.over} {sign} {self.bound:g} {unit}"
        return f"{self.system} ÷ {self.over} {sign} {self.bound:g}"


@dataclass(frozen=True)
class Measurement:
    """Systems measured in turns.

    Attributes:
        part: of `benchmarks.serve`.
        what: a line that says what was measured.
        unit: of the figures.
        rounds: the figures.
        goals: for them.
    """

    part: str
    what: str
    unit: str
    rounds: Rounds
    goals: list[Goal]

    def line(self) -> dict[str, Any]:
        return asdict(self)


def section(path: Path = RESULTS) -> str:
    """The last record of each measurement: the goals, then a table for each. Empty where nothing is recorded."""
    if not path.exists():
        return ""
    latest = {line["what"]: line for line in map(json.loads, path.read_text().splitlines())}
    goals, tables = [], []
    for line in latest.values():
        for goal in (Goal(**each) for each in line["goals"]):
            figure = goal.figure(line["rounds"])
            verdict = "met" if goal.is_met(figure) else "**not met**"
            goals.append([line["what"], goal.text(line["unit"]), figure.text(), verdict])
        tables += ["", *_table(line)]
    header = ["", "wanted", "measured: median of the rounds (least–most)", ""]
    return "\n".join(["## Serving", "", _ABOUT.strip(), "", *table(header, goals, texts=2), *tables]) + "\n"


def _table(line: dict[str, Any]) -> Sequence[str]:
    rounds: Rounds = line["rounds"]
    count = max(map(len, rounds.values()))
    return [
        f"**{line['what']}** – {line['on']}, rounds: {count}, {line['date']}, commit {line['commit']}, "
        f"`{line['command']}`",
        "",
        *table(["", line["unit"] or "figure"], ([name, Figure.of(values).text()] for name, values in rounds.items())),
    ]


_ABOUT = """
Written by `python -m benchmarks.serve`: a base in float32 without an end token, 1,000 drawn PT-MoE adapters of 40
virtual tokens, 2 experts and rank 36, where nothing else is said 32 clients, requests of 24 random tokens and answers
of 32. The systems of a table were measured in turns in one run, all of them started and warm. *zipf* asks for the
adapters with frequencies of 1 / rank. Ratios and differences are taken round by round.
"""
