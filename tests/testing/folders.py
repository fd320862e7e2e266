"""Run and comparison folders with invented scores, made by the code that writes them in earnest."""

from dataclasses import replace

import numpy as np

from ptmoe.evaluate import Evaluation
from ptmoe.runs.folders import (
    CELL_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    INSPECT_FOLDER,
    METRICS_FILE,
    NEAREST_FILE,
    RESULT_FILE,
    SEARCH_FILE,
    cell_folder,
    predictions_file,
)
from ptmoe.runs.predictions import PredictionsFile
from ptmoe.runs.records import (
    CellRecord,
    Environment,
    LogLine,
    NearestWords,
    Prediction,
    Result,
    append_line,
    write_lines,
)
from ptmoe.runs.searches import RateSearch, TrialRecord
from ptmoe.tasks import TASKS
from ptmoe.train import TrainOptions

DOMAINS = ("harbor", "market", "garden", "castle")
SVAMP_TYPES = ("addition", "division", "multiplication", "subtraction")
SIZES = {"pt": {"num_virtual_tokens": 20}, "pt-moe": {"num_virtual_tokens": 10, "rank": 10, "num_experts": 4}}
COUNTS = {"base": 0, "pt": 3840, "dpt": 3700, "smop": 4096, "pt-moe": 3764, "lora": 8192}
ONE_EACH = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.9, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
ALL_ON_SECOND = [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
ENVIRONMENT = Environment(
    versions={"python": "3.11.7", "torch": "2.99.1", "peft": None},
    commit="c0ffee1234",
    base="same",
    seed=0,
    hardware={"processor": "Abacus 9000", "cores": 2, "accelerator": None},
)


def write_run(folder, method="pt-moe", task="nano/mixed", seed=0, *, skill=0.5, tasks=None, examples=60, **options):
    """A finished run; `skill` is the chance that an example is answered right.

    Options: name, parameters, fields (of the method), model, logs, nearest, costs (of `Result`), and those of
    `evaluation`.
    """
    parameters = options.get("parameters", COUNTS.get(method, 5000))
    folder.mkdir(parents=True)
    method_fields = {"name": method, **options.get("fields", {})}
    config = TrainOptions(model=options.get("model", "nano"), method=method_fields, task=task, seed=seed)
    config.replace(learning_rate=0.0123).write(folder / CONFIG_FILE)
    ENVIRONMENT.model_copy(update={"seed": seed}).write(folder / ENVIRONMENT_FILE)
    Result(
        name=options.get("name", method),
        method=method,
        trainable_parameters=parameters,
        train_seconds=60.0 + seed,
        steps=200 if parameters else 0,
        **options.get("costs", {}),
    ).write(folder / RESULT_FILE)
    routing = {"expert_use": [0.25] * 4, "routing_confidence": 0.6} if options.get("use") else {}
    if parameters:
        falling = [
            (step, (3.2 - 2 * skill) + 2 * skill * np.exp(-step / 60) + 0.05 * seed) for step in range(10, 201, 10)
        ]
        logs = [
            LogLine(step=step, seconds=step / (7 + seed), loss=loss, epoch=0.5, **routing) for step, loss in falling
        ]
        write_lines(folder / METRICS_FILE, options.get("logs", logs))
    if options.get("nearest"):
        NearestWords(experts=options["nearest"]).write(folder / INSPECT_FOLDER / NEAREST_FILE)
    for number, evaluated in enumerate(tasks if tasks is not None else [task]):
        chance = np.random.default_rng([seed, number, *options.get("name", method).encode()])
        made = evaluation(evaluated, float(np.clip(skill - 0.05 * number, 0, 1)), examples, chance, **options)
        # Not in the order of the ids, as a real file is not.
        ordered = [made.predictions[place] for place in chance.permutation(len(made.predictions))]
        file = PredictionsFile(predictions_file(folder, evaluated, made.split), {}, [each.id for each in ordered])
        file.resume()
        file.append(ordered)
        made.write(folder)
    return folder


def evaluation(evaluated, skill, examples, chance, **options):
    """Options: metric; domains with their sizes; `use` of the experts in each domain with a hard gate, or the `gates`
    of each with a soft one; split."""
    task = TASKS.get(evaluated) or replace(TASKS["nano/mixed"], name=evaluated)
    metric = options.get("metric", task.metric)
    known = {"svamp": SVAMP_TYPES, "nano/mixed": DOMAINS, "nano/facts": DOMAINS}
    domains = options.get("domains", known.get(evaluated, ("",)))
    sizes = options.get("sizes", [len(range(place, examples, len(domains))) for place in range(len(domains))])
    predictions = []
    for place, (domain, size) in enumerate(zip(domains, sizes, strict=True)):
        for turn in range(size):
            right = float(chance.random() < skill - 0.08 * place)
            scores = {metric: right}
            if metric == "f1":
                scores = {"exact_match": right * (chance.random() < 0.8), "f1": right or 0.25}
            gate = None
            if options.get("use"):
                expert = np.searchsorted(np.cumsum(options["use"][place]), (turn + 0.5) / size)
                gate = np.eye(len(options["use"][place]))[expert].tolist()
            if options.get("gates"):
                gate = options["gates"][place]
            predictions.append(Prediction(f"{evaluated}-{domain}-{turn}", "?", "!", [], scores, domain, gate))
    experts = len(predictions[0].gate) if predictions[0].gate else 0
    square = [[1.0 if i == j else 0.37 for j in range(experts)] for i in range(experts)]
    return Evaluation(
        task=replace(task, metric=metric),
        split=options.get("split", "test"),
        predictions=predictions,
        seconds=1.0,
        settings={},
        expert_similarity=square or None,
        soft_gate=bool(options.get("gates")),
        one_expert=options.get("one_expert", False),
    )


def write_cell(folder, label, task, seed, **options):
    """One finished cell, `write_run` with its record. Options beside those of it: method, size, finished."""
    method = options.pop("method", label)
    size, finished = options.pop("size", SIZES.get(method, {})), options.pop("finished", True)
    place = write_run(folder / cell_folder(label, task, seed), method, task, seed, name=label, **options)
    if finished:
        CellRecord(
            label=label,
            method=method,
            size=size,
            task=task,
            eval_tasks=options.get("tasks") or [task],
            seed=seed,
            trainable_parameters=options.get("parameters", COUNTS.get(method, 5000)),
        ).write(place / CELL_FILE)
    return place


def write_search(folder, label, scores, *, given=0.03, chosen=None, task="nano/mixed", split="validation"):
    """A search for a label's learning rate: for each rate its scores by seed, None where the seed diverged."""
    seeds = list(range(1000, 1000 + max(map(len, scores.values()))))
    trials = [
        TrialRecord(
            number=number,
            settings={"learning_rate": rate, "seed": seed},
            scores=[] if score is None else [(134, score)],
            state="diverged" if score is None else "finished",
            error="the loss became nan" if score is None else None,
        )
        for number, (rate, seed, score) in enumerate(
            (rate, seed, score) for rate, row in scores.items() for seed, score in zip(seeds, row, strict=True)
        )
    ]
    search = RateSearch(
        label=label,
        method=label,
        task=task,
        split=split,
        examples=200,
        given=given,
        rates=sorted(scores),
        seeds=seeds,
        trials=trials,
    )
    append_line(folder / SEARCH_FILE, search.model_copy(update={"chosen": chosen or search.best}))


def write_plan(folder, **plan):
    """`comparison.yaml`, as `ptmoe compare` writes it."""
    from ptmoe.compare import ComparePlan
    from ptmoe.runs.folders import PLAN_FILE

    folder.mkdir(parents=True, exist_ok=True)
    ComparePlan(**{"tasks": ["nano/mixed"], **plan}).write(folder / PLAN_FILE)
