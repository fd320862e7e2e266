"""The README's table: the quickstart's methods on one of nano's worlds, over many seeds.

    python benchmarks/seeds.py --task nano/mixed --output docs/results/mixed.jsonl

Each cell (method, recipe, seed) is a line that is written when it is finished; a run that is started again goes on
where it stopped. Each training is exactly that of `ptmoe quickstart --task … --seed … --recipe …`.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from ptmoe.base_models import quiet
from ptmoe.quickstart import options
from ptmoe.train import train

CELLS = (("pt", "default"), ("pt-moe", "default"), ("pt-moe", "paper"))


def finished(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict]) -> str:
    """Markdown: a row for each method, mean and range over seeds."""
    rows = [
        "| method | trained parameters | accuracy %, mean | lowest | highest | seeds | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, recipe in CELLS:
        cell = [line for line in lines if (line["method"], line["recipe"]) == (method, recipe)]
        if cell:
            scores = [line["accuracy"] for line in cell]
            name = method if method == "pt" else f"{method}, recipe {recipe}"
            rows.append(
                f"| {name} | {cell[0]['trainable_parameters']:,} | {statistics.mean(scores):.1f} | {min(scores):.1f} | "
                f"{max(scores):.1f} | {len(cell)} | {statistics.mean(line['seconds'] for line in cell):.0f} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="nano/mixed")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a finished cell")
    chosen = parser.parse_args()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    quiet()
    for seed in range(chosen.seeds):
        for method, recipe in CELLS:
            done = {(line["method"], line["recipe"], line["seed"]) for line in finished(chosen.output)}
            if (method, recipe, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                plan = options(method, task=chosen.task, seed=seed, recipe=recipe)
                trained = train(plan.replace(output_dir=f"{folder}/run"))
                summary = trained.evaluation.summary()
            line = {
                "task": chosen.task,
                "method": method,
                "recipe": recipe,
                "seed": seed,
                "accuracy": round(trained.evaluation.accuracy, 2),
                "trainable_parameters": trained.result.trainable_parameters,
                "seconds": round(trained.result.train_seconds, 1),
                "by_domain": {name: part["accuracy"] for name, part in summary["by_domain"].items()},
                "use": summary["routing"] and summary["routing"]["use"],
            }
            with chosen.output.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
            print(method, recipe, seed, line["accuracy"], flush=True)
    print(table(finished(chosen.output)))


if __name__ == "__main__":
    main()
