"""Checks that README and docs print the tables that the recorded lines give: `python docs/check_tables.py`."""

import csv
import sys
from math import log
from pathlib import Path
from statistics import fmean

from scipy import stats

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
REAL = (
    "real_mixture.jsonl",
    "real_short.jsonl",
    "real_longer.jsonl",
    "real_squad.jsonl",
    "real_words.jsonl",
    "real_league.jsonl",
)
sys.path.insert(0, str(ROOT / "benchmarks"))

sys.path.insert(0, str(ROOT))

import tabulate_methods  # noqa: E402  # beside this file
import tabulate_peft  # noqa: E402
from benchmarks.real.table import rates, summary  # noqa: E402
from benchmarks.real.table import table as real_table  # noqa: E402
from seeds import finished, table  # noqa: E402

from ptmoe.runs.searches import RateSearch  # noqa: E402

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def scores_by_label(file: Path) -> dict[str, list[float]]:
    """Of a comparison's cells."""
    with file.open(newline="") as opened:
        cells = [(row["label"], float(row["accuracy"])) for row in csv.DictReader(opened)]
    return {label: [score for of, score in cells if of == label] for label, _ in cells}


def row_of(scores: list[float]) -> str:
    """The end of a method's row: mean, 95 % interval over seeds (Student's t), seeds."""
    half = stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores)
    return f"{fmean(scores):.1f} ± {half:.1f} | {len(scores)} |"


def searched(file: Path) -> str:
    """What each method scored at each rate, the nearest of `RATES`."""
    lines = ["| method | " + " | ".join(map(str, RATES)) + " |", "|---" * (1 + len(RATES)) + "|"]
    for search in RateSearch.read_lines(file):
        cells = dict.fromkeys(RATES, "")
        for trial in search.trials:
            rate = trial.settings["learning_rate"]
            score = f"{trial.scores[-1][1]:.1f}"
            nearest = min(RATES, key=lambda of: abs(log(of / rate)))
            cells[nearest] = f"**{score}**" if rate == search.chosen else score
        lines.append(f"| {search.label} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def main() -> None:
    compared = [(RESULTS / name).read_text().splitlines() for name in ("mixed_methods.md", "league_methods.md")]
    expected = [
        ("README.md", summary(RESULTS)),
        ("README.md", table(finished(RESULTS / "mixed.jsonl"))),
        ("docs/findings.md", table(finished(RESULTS / "words.jsonl"))),
        ("docs/findings.md", table(finished(RESULTS / "tried.jsonl"))),
        *(("docs/findings.md", table(finished(RESULTS / name))) for name in ("gate.jsonl", "gate_words.jsonl")),
        *(("docs/findings.md", real_table(RESULTS / name)) for name in REAL),
        *(("docs/findings.md", rates(RESULTS / name)) for name in ("real_search.jsonl", "real_variants.jsonl")),
        *(("docs/findings.md", "\n".join(line for line in lines if line.startswith("|"))) for lines in compared),
        ("docs/findings.md", searched(RESULTS / "real_league_search.jsonl")),
        ("docs/methods.md", tabulate_methods.table()),
        *(("docs/peft.md", text) for text in tabulate_peft.tables()),
    ]
    rows = [line.replace("**", "") for line in compared[1]]
    lacking = [
        f"league_methods.md has no row of {label} with {row_of(scores)}"
        for label, scores in scores_by_label(RESULTS / "league.csv").items()
        if not any(row.startswith(f"| {label} | ") and row.endswith(row_of(scores)) for row in rows)
    ]
    findings = (ROOT / "docs" / "findings.md").read_text()
    lacking += [
        f"findings.md has no row of {label} with {row_of(scores)}"
        for label, scores in scores_by_label(RESULTS / "router_rate.csv").items()
        if f"| {label} | {min(scores):.1f} | {row_of(scores)}" not in findings
    ]
    wrong = lacking + [
        f"{page} lacks this table:\n{text}" for page, text in expected if text not in (ROOT / page).read_text()
    ]
    sys.exit("\n\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
