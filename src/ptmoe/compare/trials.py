"""One trial of a search, in a worker of Ray Tune: a training that says, now and then, how it does on examples that it
does not train on."""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune import Callback
from transformers import TrainerCallback

from ptmoe.compare.on_ray import RETRIES
from ptmoe.compare.search import TunePlan
from ptmoe.compare.workers import error_message
from ptmoe.models.bases import load_tokenizer, quiet
from ptmoe.runs.searches import mean_score
from ptmoe.tasks import task_named
from ptmoe.tasks.tokens import uses_chat
from ptmoe.train import train
from ptmoe.train.examples import evaluation_examples
from ptmoe.train.options import TrainOptions
from ptmoe.train.recipe import evaluated

WORST = float("-inf")


class Validation(TrainerCallback):
    """Reports a training's score on its validation examples, evenly over its steps.

    Args:
        options: of the training, with `validation_examples`.
        evaluations: how many times, the one after the training included, which is the training's own.
        report: called with the step and the score, in percent.
    """

    def __init__(self, options: TrainOptions, evaluations: int, report: Callable[[int, float], None]) -> None:
        self.examples = evaluation_examples(options, lambda line: None)
        self.tokenizer, _ = load_tokenizer(options.model, revision=options.revision)
        chat = uses_chat(task_named(options.task or str(options.data)), self.tokenizer, options.chat)
        self.options, self.evaluations, self.report = options.replace(chat=chat), evaluations, report

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        steps = {-(-state.max_steps * part // self.evaluations) for part in range(1, self.evaluations)}
        if state.global_step in steps - {state.max_steps}:
            evaluations = evaluated(self.options, model, self.tokenizer, self.examples)
            self.report(state.global_step, mean_score(evaluation.summary() for evaluation in evaluations))


class Results(Callback):
    """Collects, where the search runs, what its trials report.

    Args:
        ended: called with each trial that ends: its number, its scores by step, whether it trained to its end, and what
            went wrong.
    """

    def __init__(self, ended: Callable[[int, list[tuple[int, float]], bool, str | None], None]) -> None:
        self.ended = ended
        self.results: dict[int, list[dict[str, Any]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # Tune writes its callbacks to a file, which nobody reads
        return Results, (print,)

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.results[trial.config["number"]] = []  # of one whose machine died, what it had reported

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.results.setdefault(trial.config["number"], []).append(result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        results = self.results.get(trial.config["number"], [])
        scores = [(result["step"], result["score"]) for result in results if "step" in result]
        error = next((result["error"] for result in results if "error" in result), None)
        self.ended(trial.config["number"], scores, any(result.get("last") for result in results), error)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self.ended(trial.config["number"], [], False, f"its process or its machine died {1 + RETRIES} times")


def trial(
    config: dict[str, Any],
    plan: dict[str, Any],
    settings: list[dict[str, Any]],
    known: dict[int, list[tuple[int, float]]],
    place: str,
) -> None:
    """A trial, by its number in `config`.

    Args:
        config: `{"number": …}`.
        plan: the values of a `TunePlan`.
        settings: of all trials.
        known: the scores of those that ran before, which are reported again and not run.
        place: where the names of files in the plan start; Tune has gone to a folder of its own.
    """
    from ray import tune

    def report(step: int, score: float, last: bool = False) -> None:
        tune.report({"step": step, "score": score, "last": last})

    number = config["number"]
    for step, score in known.get(number, ()):
        report(step, score)
    if number in known:
        return
    quiet()
    with suppress(OSError):  # another machine without this folder
        os.chdir(place)
    search = TunePlan(**plan)
    try:
        with tempfile.TemporaryDirectory(prefix="ptmoe-") as folder:
            options = search.trial(settings[number], output_dir=str(Path(folder) / "run"))
            options = options.replace(trainer={"save_strategy": "no", **options.trainer})
            callback = Validation(options, search.evaluations, report)
            trained = train(options, callbacks=[callback], say=lambda line: None)
        summaries = (evaluation.summary() for evaluation in trained.evaluations)
        report(trained.result.steps, mean_score(summaries), last=True)
    except Exception as error:
        tune.report({"score": WORST, "error": error_message(error)})
