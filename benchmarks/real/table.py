"""The lines of `benchmarks.population` as tables: `python -m benchmarks.real.table results.jsonl [--rates]`.

Accuracy on the test split, mean, lowest and highest over seeds; and the difference to plain prompt tuning, or
`--against` another row, on the same examples, each example's accuracy averaged over seeds first, with the 95 % interval
of the bootstrap over examples. With `--rates` accuracy and loss on the examples that learning rates are chosen by,
under rates rounded to one digit. `--lines` prints such lines of the folder of a `ptmoe compare`; `--summary` prints
README's table from the folder of all lines.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from ptmoe.report import read_comparison
from ptmoe.runs.folders import cell_folder, predictions_file
from ptmoe.tasks.resampling import Group, bootstrap_interval

REFERENCE = "pt"
# Columns of README's table: a study at a size, the file of its lines, and which of its rows is each method's.
SUMMARY: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "six sets, 11,500",
        "real_mixture.jsonl",
        {
            "pt": "pt",
            "dpt": "dpt",
            "pt-moe": "pt-moe, 3 experts of 40 tokens, rate 0.1",
            "pt-moe-road": "pt-moe-road, one expert",
        },
    ),
    (
        "three sets, 25,000",
        "real_league.jsonl",
        {name: name for name in ("pt", "dpt", "pt-moe", "pt-moe-road", "road", "vera")},
    ),
    (
        "three sets, 80,000",
        "real_league.jsonl",
        {name: f"{name}, 80k" for name in ("pt", "dpt", "pt-moe", "vera")} | {"lora": "lora", "ln-tuning": "ln-tuning"},
    ),
    (
        "SQuAD, 11,500",
        "real_squad.jsonl",
        {
            "pt": "pt",
            "dpt": "dpt, rate 0.3",
            "pt-moe": "pt-moe, rate 0.3",
            "pt-moe-road": "pt-moe-road, one expert",
        },
    ),
    (
        "word problems, 11,500",
        "real_words.jsonl",
        {name: name for name in ("pt", "dpt", "pt-moe")} | {"pt-moe-road": "pt-moe-road, one expert"},
    ),
)


def table(path: Path, reference: str = REFERENCE) -> str:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read(path):
        if line["split"] == "test":
            runs[line["label"]].append(line)
    domains = list(max((line["domains"] for lines in runs.values() for line in lines), key=len))
    right = {
        label: np.mean([[float(c) for c in line["right"]] for line in lines], axis=0)
        for label, lines in runs.items()
        if lines[0].get("domain") is None
    }
    rows = []
    for label, lines in runs.items():
        seeds: dict[int, list[dict[str, Any]]] = defaultdict(list)  # with a run for each domain, or one for all
        for line in lines:
            seeds[line["seed"]].append(line)
        scores = [
            np.average([x["accuracy"] for x in each], weights=[x["examples"] for x in each]) for each in seeds.values()
        ]
        against = "–"
        if label in right and label != reference:
            difference = 100 * (right[label] - right[reference])
            low, high = bootstrap_interval([Group(1.0, difference)])
            against = f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
        found = [
            f"{np.mean([line['domains'][name] for line in lines if name in line['domains']]):.0f}" for name in domains
        ]
        parameters = sum(line["parameters"] for line in next(iter(seeds.values())))
        rows.append(
            (
                -np.mean(scores),
                f"| {label} | {parameters:,} | {np.mean(scores):.1f} | {min(scores):.1f} | {max(scores):.1f} | "
                f"{len(seeds)} | {against} | {' | '.join(found)} |",
            )
        )
    head = [
        f"| | trainable parameters | accuracy %, mean | lowest | highest | seeds | against {reference} [95 %] | "
        + " | ".join(name.rpartition("/")[2] for name in domains)
        + " |",
        "|---|" + "---|" * (6 + len(domains)),
    ]
    return "\n".join(head + [row for _, row in sorted(rows)])


def summary(folder: Path) -> str:
    columns: list[dict[str, float]] = []
    for _, file, labels in SUMMARY:
        scores: dict[str, list[float]] = defaultdict(list)
        for line in read(folder / file):
            if line["split"] == "test":
                scores[line["label"]].append(line["accuracy"])
        columns.append({method: round(float(np.mean(scores[label])), 1) for method, label in labels.items()})
    rows = ["| | " + " | ".join(heading for heading, *_ in SUMMARY) + " |", "|---" * (1 + len(SUMMARY)) + "|"]
    for method in dict.fromkeys(name for column in columns for name in column):
        cells = [f"{column[method]:.1f}" if method in column else "" for column in columns]
        best = [column.get(method) == max(column.values()) for column in columns]
        found = (f"**{cell}**" if first else cell for cell, first in zip(cells, best, strict=True))
        rows.append(f"| {method} | {' | '.join(found)} |")
    return "\n".join(rows)


def rates(path: Path) -> str:
    runs: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in read(path):
        runs[line["task"], line["label"]][float(f"{line['learning_rate']:.1g}")].append(line)
    columns = sorted({rate for tried in runs.values() for rate in tried})
    rows = [
        "| task | | seeds | " + " | ".join(f"at {rate:g}" for rate in columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for (task, label), tried in sorted(runs.items()):
        cells = [
            f"{np.mean([x['accuracy'] for x in tried[rate]]):.1f}, {np.mean([x['loss'] for x in tried[rate]]):.3f}"
            if rate in tried
            else ""
            for rate in columns
        ]
        counts = sorted({len(lines) for lines in tried.values()})
        seeds = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        rows.append(f"| {task} | {label} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(rows)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of each trained cell of a comparison; where there is an exact match, that counts as right, with F1 beside it."""
    lines = []
    for cell in read_comparison(folder).cells:
        if cell.method == "base":
            continue
        place, right, beside = cell_folder(cell.label, cell.task, cell.seed), "", {}
        for task in cell.eval_tasks:
            evaluation = cell.run.evaluations[task]
            metrics, metric = evaluation.metrics, "exact_match" if "exact_match" in evaluation.metrics else "accuracy"
            marks = {d["id"]: d["scores"] for d in read(predictions_file(folder / place, task))}
            right += "".join("01"[marks[name][metric] > 0] for name in sorted(marks))
            if "f1" in metrics:
                beside["f1"] = round(metrics["f1"], 2)
            else:
                parts = evaluation.by_domain if len(cell.eval_tasks) == 1 else {}
                beside |= {name: round(part[metric], 2) for name, part in (parts or {task: metrics}).items()}
        line = {"label": cell.label, "parameters": cell.run.result.trainable_parameters, "seed": cell.seed}
        line |= {"split": "test", "examples": len(right), "accuracy": round(100 * right.count("1") / len(right), 2)}
        lines.append(line | {"domains": beside, "right": right})
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--against", default=REFERENCE, metavar="LABEL", help="of the row that others differ from")
    given = parser.parse_args()
    if given.summary:
        print(summary(given.results))
        raise SystemExit
    if given.lines:
        print(*map(json.dumps, lines_of(given.results)), sep="\n")
        raise SystemExit
    if not given.results.is_file():
        parser.error(f"no file {given.results}: give the lines that `python -m benchmarks.population` wrote")
    if given.against not in (known := dict.fromkeys(line["label"] for line in read(given.results))) and not given.rates:
        parser.error(f"no row {given.against!r} to compare with: give --against one of {', '.join(known)}")
    print(rates(given.results) if given.rates else table(given.results, given.against))
