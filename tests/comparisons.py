"""Comparison folders with made-up scores, as `ptmoe compare` writes them."""

import json

import numpy as np
import yaml

from ptmoe.tasks import TASKS
from ptmoe.tasks.scoring import summarise

DOMAINS = ("harbor", "market", "garden", "castle")
SVAMP_TYPES = ("addition", "division", "multiplication", "subtraction")
SIZES = {"pt": {"num_virtual_tokens": 20}, "pt-moe": {"num_virtual_tokens": 10, "rank": 10, "num_experts": 4}}
COUNTS = {"base": 0, "pt": 3840, "dpt": 3700, "smop": 4096, "pt-moe": 3764, "lora": 8192}


def write_cell(folder, label, task, seed, *, skill=0.5, tasks=None, examples=60, use=None, **options):
    """One finished cell; `skill` is the chance that an example is answered right.

    Options: method, parameters, size, fields (of the method), model, finished, nearest.
    """
    method = options.get("method", label)
    parameters = options.get("parameters", COUNTS.get(method, 5000))
    size = options.get("size", SIZES.get(method, {}))
    tasks = tasks or [task]
    place = folder / "cells" / label.replace("/", "__") / task.replace("/", "__") / f"seed-{seed}"
    for name in ("eval", "predictions"):
        (place / name).mkdir(parents=True)
    for number, evaluated in enumerate(tasks):
        chance = np.random.default_rng([seed, number, *label.encode()])
        _evaluate(place, evaluated, np.clip(skill - 0.05 * number, 0, 1), examples, use, chance)
    config = {
        "model": options.get("model", "nano"),
        "method": {"name": method, **options.get("fields", {})},
        "seed": seed,
    }
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.99.1", "peft": None},
        "commit": "c0ffee1234",
        "seed": seed,
        "hardware": {"processor": "Abacus 9000", "cores": 2, "accelerator": None},
    }
    _json(place / "environment.json", environment)
    result = {"name": method, "method": method, "trainable_parameters": parameters, "train_seconds": 60.0 + seed}
    _json(place / "result.json", {**result, "steps": 200 if parameters else 0})
    if parameters:
        logs = [
            {
                "step": step,
                "seconds": step / (7 + seed),
                "loss": (3.2 - 2 * skill) + 2 * skill * np.exp(-step / 60) + 0.05 * seed,
            }
            for step in range(10, 201, 10)
        ]
        if use:
            logs = [
                {**log, "expert_use": [0.25] * len(use[0]), "routing_confidence": 0.6, "hardness": log["step"] / 200}
                for log in logs
            ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(log) + "\n" for log in logs))
    if options.get("nearest"):
        (place / "routing").mkdir()
        _json(place / "routing" / "nearest.json", {"experts": options["nearest"]})
    if options.get("finished", True):
        cell = {"label": label, "method": method, "size": size, "task": task, "eval_tasks": tasks, "seed": seed}
        _json(place / "cell.json", {**cell, "trainable_parameters": parameters})
    return place


def _evaluate(place, name, skill, examples, use, chance):
    task = TASKS[name]
    domains = {"svamp": SVAMP_TYPES, "nano/mixed": DOMAINS, "nano/facts": DOMAINS}.get(name, ("",))
    asked = [domains[number % len(domains)] for number in range(examples)]
    marks = []
    for number in range(examples):
        right = chance.random() < skill - 0.08 * (number % len(domains))
        if task.grader == "qa":
            marks.append({"exact_match": float(right and chance.random() < 0.8), "f1": float(right) or 0.25})
        else:
            marks.append({"accuracy": float(right)})
    routing = None
    if use:
        rows = dict(zip(domains, use, strict=False))
        shared = {"num_experts": len(use[0]), "use": rows, "mean_gate": rows}
        square = [[1.0 if i == j else 0.2 for j in range(len(use[0]))] for i in range(len(use[0]))]
        routing = {**shared, "entropy": 1.25, "mutual_information": 0.87, "prompt_similarity": square}
    stem = name.replace("/", "__")
    _json(
        place / "eval" / f"{stem}.json", {**summarise(task, "test", marks, asked), "routing": routing, "seconds": 1.0}
    )
    with (place / "predictions" / f"{stem}.jsonl").open("w") as file:
        # Not in the order of the ids, as a real file is not.
        for number in chance.permutation(examples):
            line = {
                "id": f"{name}-{number}",
                "prompt": "?",
                "completion": "!",
                "references": [],
                "scores": marks[number],
            }
            file.write(json.dumps({**line, "domain": asked[number], "gate": None}) + "\n")


def _json(path, value):
    path.write_text(json.dumps(value))
