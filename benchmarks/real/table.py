"""The lines of `benchmarks.population` as a table: `python -m benchmarks.real.table results.jsonl`.

Accuracy on the test split, mean, lowest and highest over seeds; and the difference to plain prompt tuning on the same
examples, each example's accuracy averaged over seeds first, with the 95 % interval of the bootstrap over examples.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ptmoe.tasks.resampling import Group, bootstrap_interval

REFERENCE = "pt"


def table(path: Path) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["split"] == "test":
            runs[line["label"]].append(line)
    domains = list(next(iter(runs.values()))[0]["domains"])
    right = {
        label: np.mean([[float(c) for c in line["right"]] for line in lines], axis=0) for label, lines in runs.items()
    }
    rows = [
        "| | trainable parameters | accuracy %, mean | lowest | highest | seeds | against pt [95 %] | "
        + " | ".join(name.rpartition("/")[2] for name in domains)
        + " |",
        "|---|" + "---|" * (6 + len(domains)),
    ]
    for label, lines in sorted(runs.items(), key=lambda item: -right[item[0]].mean()):
        scores = [line["accuracy"] for line in lines]
        against = "–"
        if label != REFERENCE:
            difference = 100 * (right[label] - right[REFERENCE])
            low, high = bootstrap_interval([Group(1.0, difference)])
            against = f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
        each = [f"{np.mean([line['domains'][name] for line in lines]):.0f}" for name in domains]
        rows.append(
            f"| {label} | {lines[0]['parameters']:,} | {np.mean(scores):.1f} | {min(scores):.1f} | {max(scores):.1f} | "
            f"{len(lines)} | {against} | {' | '.join(each)} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
