"""The tables of README and docs/findings.md: variants of the quickstart's methods, on one of nano's worlds, over seeds.

    python benchmarks/seeds.py --task nano/mixed --output docs/results/mixed.jsonl
    python benchmarks/seeds.py --task nano/mixed --cells table tried --seeds 2 --output docs/results/tried.jsonl

Each finished cell (variant, seed) is a line, written as it comes; an interrupted run resumes. A training is that of
`ptmoe quickstart --task … --seed …`, the preset `quickstart` of `ptmoe compare`, but for what its cell changes.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from ptmoe.compare import prepare, read_plan
from ptmoe.models.bases import quiet
from ptmoe.train import train

MOE: dict[str, Any] = {"method": "pt-moe"}
APART: dict[str, Any] = {"distinct_experts": True, "shared_factor": False}  # the default when TRIED was measured
SHORTER = {"warmup_steps": 20}  # the default when what has it was measured; now it is 40 of the 400
TABLE: dict[str, dict[str, Any]] = {
    "pt-moe": MOE,
    "pt": {"method": "pt", "options": SHORTER},
    "pt-moe, recipe paper": MOE | {"fields": {"recipe": "paper"}, "options": SHORTER},
}
# What was tried beside it. `constants` are module constants of the training recipe.
TRIED: dict[str, dict[str, Any]] = {
    "router inputs of standard deviation 1": MOE
    | {"fields": APART, "constants": {"ptmoe.methods.routing.SPREAD": 1.0}},
    "router inputs of standard deviation 1/6": MOE
    | {"fields": APART, "constants": {"ptmoe.methods.routing.SPREAD": 1 / 6}},
    "router started at random": MOE | {"fields": APART | {"router_init": "random"}},
    "no standardisation": MOE | {"fields": APART | {"router_standardize": False}},
    "no annealing": MOE | {"fields": APART | {"routing_anneal": False}},
    "hardened at 60 % of the steps, settled or not": MOE
    | {"fields": APART, "constants": {"ptmoe.train.routing.EARLIEST": 0.6}},
    "all experts start alike": MOE | {"fields": {"distinct_experts": False, "shared_factor": False}},
    "eight experts of rank 8": MOE | {"fields": APART | {"num_experts": 8, "rank": 8}},
    "two experts of rank 10": MOE | {"fields": APART | {"num_experts": 2}},
    "pt-moe, learning rate 0.01": MOE | {"fields": APART, "options": {"learning_rate": 0.01}},
    "pt-moe, learning rate 0.1": MOE | {"fields": APART, "options": {"learning_rate": 0.1}},
    "pt, learning rate 0.01": {"method": "pt", "options": {"learning_rate": 0.01}},
    "pt, learning rate 0.1": {"method": "pt", "options": {"learning_rate": 0.1}},
    "smop, four prompts of four tokens": {
        "method": "pt",
        "fields": {"name": "smop", "num_experts": 4, "num_virtual_tokens": 4},
    },
}
TRIED = {name: cell | {"options": SHORTER | cell.get("options", {})} for name, cell in TRIED.items()}
WHOLE = {"routing_anneal": False, "probationary": False}
SOON = {f"ptmoe.train.routing.{name}": 0.1 for name in ("EARLIEST", "LATEST", "HARDENING")}
GATE: dict[str, dict[str, Any]] = {  # today's default otherwise
    "chosen and whole from the first step": MOE | {"fields": WHOLE},
    "the same, the router at a tenth of its pace": MOE
    | {"fields": WHOLE, "constants": {"ptmoe.methods.routing.ROUTER_RATE": 0.576}},
    "chosen from the first step": MOE | {"fields": {"routing_anneal": False}},
    "whole": MOE | {"fields": {"probationary": False}},
    "soft for a tenth of the steps, hardened over the next": MOE | {"constants": SOON},
    "the same, whole": MOE | {"fields": {"probationary": False}, "constants": SOON},
}
CELLS = TABLE | TRIED | GATE


@contextmanager
def constants(values: dict[str, float]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch(name, value))
        yield


def finished(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each cell, over its seeds."""
    rows = [
        "| | trainable parameters | accuracy %, mean | lowest | highest | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name in CELLS:
        of = [line for line in lines if line["cell"] == name]
        if of:
            scores = [line["accuracy"] for line in of]
            rows.append(
                f"| {name} | {of[0]['trainable_parameters']:,} | {statistics.mean(scores):.1f} | {min(scores):.1f} | "
                f"{max(scores):.1f} | {len(of)} |"
            )
    return "\n".join(rows)


def measure(task: str, name: str, seed: int) -> dict[str, Any]:
    cell = CELLS[name]
    planned = {"methods": [cell["method"]], "tasks": [task], "seeds": [seed]}
    options = prepare(read_plan(None, {"preset": "quickstart", **planned})).cells[0].options
    method = options.method | cell.get("fields", {})
    with tempfile.TemporaryDirectory() as folder, constants(cell.get("constants", {})):
        trained = train(options.replace(method=method, output_dir=f"{folder}/run", **cell.get("options", {})))
    summary = trained.evaluations[0].summary()
    return {
        "task": task,
        "cell": name,
        "seed": seed,
        "accuracy": round(summary.metrics["accuracy"], 2),
        "trainable_parameters": trained.result.trainable_parameters,
        "by_domain": {domain: part["accuracy"] for domain, part in summary.by_domain.items()},
        "use": summary.routing and summary.routing.use,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="nano/mixed")
    parser.add_argument("--cells", nargs="+", default=["table"], help="table, tried, gate, or names of cells")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a finished cell")
    chosen = parser.parse_args()
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    quiet()

    def lines() -> list[dict[str, Any]]:
        return [line for line in finished(chosen.output) if line["task"] == chosen.task]

    groups = {"table": tuple(TABLE), "tried": tuple(TRIED), "gate": tuple(GATE)}
    for name in [name for cell in chosen.cells for name in groups.get(cell, (cell,))]:
        for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
            if (name, seed) not in {(line["cell"], line["seed"]) for line in lines()}:
                line = measure(chosen.task, name, seed)
                with chosen.output.open("a") as opened:
                    opened.write(json.dumps(line) + "\n")
                print(name, seed, line["accuracy"], flush=True)
    print(table(lines()))


if __name__ == "__main__":
    main()
