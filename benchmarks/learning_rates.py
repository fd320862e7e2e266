"""Which learning rate suits a method on nano's mixed world: trained on its train split, judged on its validation split.

    python benchmarks/learning_rates.py --output docs/results/learning_rates.jsonl

Each method has the size that `ptmoe compare --budget 3840` picks, or its smallest. A line for each method and rate,
written as it comes; started again, it continues where it stopped. The seed is none of those that the tables use.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ptmoe import nano
from ptmoe.compare import prepare, read_plan
from ptmoe.compare.budget import fit_budget
from ptmoe.errors import PtmoeError
from ptmoe.evaluate import evaluate
from ptmoe.methods import METHODS
from ptmoe.methods.shelf import SHORT
from ptmoe.models.bases import quiet
from ptmoe.tasks import load_task
from ptmoe.train import train

BUDGET, SEED, TASK = 3_840, 100, "nano/mixed"
PROMPTS = [0.01, 0.03, 0.1]
WEIGHTS = [3e-3, 1e-2, 3e-2]
RATES: dict[str, list[float]] = {
    "lora": [1e-3, *WEIGHTS],
    "hydralora": [1e-3, *WEIGHTS],
    "dora": WEIGHTS,
    "pissa": WEIGHTS,
    "eva": WEIGHTS,
    "corda": [*WEIGHTS, 1e-1],
    "kasa": [*WEIGHTS, 1e-1, 3e-1],
    "riemannian": WEIGHTS,
    "lora-fa": [*WEIGHTS, 1e-1, 3e-1],
    "vera": [*WEIGHTS, 1e-1, 3e-1],
    "ia3": [*WEIGHTS, 1e-1, 3e-1, 1.0],
    "lora-xs": [*WEIGHTS, 1e-1, 3e-1],
    "svfit": [*WEIGHTS, 1e-1, 3e-1, 1.0],
    "sorsa": [1e-3, *WEIGHTS],
    "soka": [1e-3, *WEIGHTS],
    "edora": [*WEIGHTS, 1e-1],
    "goat": [3e-4, 1e-3, *WEIGHTS],
    "bilora": [1e-3, *WEIGHTS],
    "ft": [1e-4, 3e-4, 1e-3],
    "dpt": PROMPTS,
    "smop": PROMPTS,
    "attempt": [*PROMPTS, 0.3, 1.0],
    "p-tuning": [1e-3, 3e-3, 1e-2],
    "prefix-tuning": [*PROMPTS, 0.3],
    "multitask-prompt-tuning": PROMPTS,
    "ulpt": [3e-3, *PROMPTS],
    "mept": PROMPTS,
    "id-spam": [3e-3, *PROMPTS],
    "ept": PROMPTS,
    **{short: [1e-3, *WEIGHTS, 1e-1, 3e-1] for short in SHORT},
}
FIXED: dict[str, dict[str, Any]] = {
    "smop": {"num_experts": 4},
    "dpt": {"num_virtual_tokens": 20},
    "attempt": {"bottleneck": 1},
    "ulpt": {"num_virtual_tokens": 20},
    "p-tuning": {"num_virtual_tokens": 8, "encoder_hidden_size": 5},
    "randlora": {"r": 96},
    "c3a": {"block_size": 96},
}


def fields(method: str) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(nano.FOLDER)
    fixed = FIXED.get(method, {})
    try:
        chosen = fit_budget(config, METHODS[method], BUDGET, fixed)
    except PtmoeError:  # none of its sizes is that small
        chosen = METHODS[method](**fixed)
    return {"name": method, **chosen.model_dump(exclude_none=True)}


def run(method: str, rate: float) -> dict[str, Any]:
    changes = {"methods": [fields(method)], "learning_rate": rate, "seeds": [SEED], "tasks": [TASK], "eval_examples": 1}
    (cell,) = prepare(read_plan(None, {"preset": "quickstart", **changes})).cells
    with tempfile.TemporaryDirectory() as folder:
        trained = train(cell.options.replace(output_dir=str(Path(folder) / "run")), say=lambda _: None)
    held_out = load_task(TASK, "validation")
    accuracy = evaluate(trained.model, trained.tokenizer, held_out, split="validation").metrics["accuracy"]
    return {
        "method": method,
        "learning_rate": rate,
        "trainable_parameters": trained.result.trainable_parameters,
        "accuracy": round(accuracy, 2),
        "train_seconds": trained.result.train_seconds,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, required=True)
    arguments.add_argument("--method", nargs="*", choices=sorted(RATES), default=list(RATES))
    chosen = arguments.parse_args()
    quiet()
    lines = [json.loads(line) for line in chosen.output.read_text().splitlines()] if chosen.output.exists() else []
    done = {(line["method"], line["learning_rate"]) for line in lines}
    for method in chosen.method:
        for rate in RATES[method]:
            if (method, rate) not in done:
                line = run(method, rate)
                with chosen.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(method, rate, line["accuracy"], flush=True)


if __name__ == "__main__":
    main()
