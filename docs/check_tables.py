"""Checks that README and docs print the tables that the recorded lines give: `python docs/check_tables.py`."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

sys.path.insert(0, str(ROOT))

import tabulate_methods  # noqa: E402  # beside this file
import tabulate_peft  # noqa: E402
from benchmarks.real.table import rates  # noqa: E402
from benchmarks.real.table import table as real_table  # noqa: E402
from seeds import finished, table  # noqa: E402


def main() -> None:
    compared = [(RESULTS / name).read_text().splitlines() for name in ("mixed_methods.md", "league_methods.md")]
    expected = [
        ("README.md", table(finished(RESULTS / "mixed.jsonl"))),
        ("docs/findings.md", table(finished(RESULTS / "words.jsonl"))),
        ("docs/findings.md", table(finished(RESULTS / "tried.jsonl"))),
        *(("docs/findings.md", real_table(RESULTS / name)) for name in ("real_mixture.jsonl", "real_short.jsonl")),
        ("docs/findings.md", rates(RESULTS / "real_search.jsonl")),
        *(("docs/findings.md", "\n".join(line for line in lines if line.startswith("|"))) for lines in compared),
        ("docs/methods.md", tabulate_methods.table()),
        *(("docs/peft.md", text) for text in tabulate_peft.tables()),
    ]
    wrong = [f"{page} lacks this table:\n{text}" for page, text in expected if text not in (ROOT / page).read_text()]
    sys.exit("\n\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
