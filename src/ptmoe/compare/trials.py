"""One trial of a search, in a worker of Ray Tune: a training that says, now and then, how it does on examples that it
does not train on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from transformers import TrainerCallback

from ptmoe.compare.on_ray import RETRIES
from ptmoe.compare.search import TunePlan
from ptmoe.compare.workers import error_message
from ptmoe.evaluate import evaluate
from ptmoe.models.bases import load_tokenizer, quiet
from ptmoe.tasks import Problems, task_named
from ptmoe.tasks.tokens import uses_chat
from ptmoe.train import train
from ptmoe.train.examples import training_examples
from ptmoe.train.options import TrainOptions

WORST = float("-inf")


class TrialEnded(Exception):  # noqa: N818
    """Ends a training where its evaluation on the test split would begin, which a search must not see."""


class Validation(TrainerCallback):
    """Reports a training's score on examples of its own, so many times, evenly over its steps, the last time with the
    adapter as it would be saved.

    Args:
        options: of the training; `max_examples` are all that it may read.
        validation_examples: the last of them.
        evaluations: how many times.
        report: called with the step, the score, in percent, and whether it is the last.
    """

    def __init__(
        self,
        options: TrainOptions,
        validation_examples: int,
        evaluations: int,
        report: Callable[[int, float, bool], None],
    ) -> None:
        problems = Problems(skip=options.skip_bad, at_once=options.data is None)
        self.examples = list(training_examples(options, problems, lambda line: None))[-validation_examples:]
        self.task = task_named(options.task or str(options.data))
        self.tokenizer, _ = load_tokenizer(options.model, revision=options.revision)
        self.chat = uses_chat(self.task, self.tokenizer, options.chat)
        self.options, self.evaluations, self.report = options, evaluations, report

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        steps = {-(-state.max_steps * part // self.evaluations) for part in range(1, self.evaluations)}
        if state.global_step in steps - {state.max_steps}:
            self._score(state.global_step, model, last=False)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._score(state.global_step, model, last=True)
        raise TrialEnded

    def _score(self, step: int, model: Any, *, last: bool) -> None:
        evaluation = evaluate(
            model,
            self.tokenizer,
            self.examples,
            task=self.task,
            split="train",
            score=self.options.score,
            batch_size=self.options.eval_batch_size,
            max_new_tokens=self.options.max_new_tokens,
            max_length=self.options.max_length,
            chat=self.chat,
        )
        self.report(step, evaluation.metrics[self.task.metric], last)


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
    examples: int,
    settings: list[dict[str, Any]],
    known: dict[int, list[tuple[int, float]]],
) -> None:
    """A trial, by its number in `config`.

    Args:
        config: `{"number": …}`.
        plan: the values of a `TunePlan`.
        examples: that there are, those to validate on included.
        settings: of all trials.
        known: the scores of those that ran before, which are reported again and not run.
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
    search = TunePlan(**plan)
    try:
        with tempfile.TemporaryDirectory(prefix="ptmoe-") as folder:
            options = search.trial(settings[number], max_examples=examples, eval_task=None, eval_examples=1)
            callback = Validation(options, search.validation_examples, search.evaluations, report)
            alone = {"output_dir": str(Path(folder) / "run"), "max_examples": examples - search.validation_examples}
            trainer = {"save_strategy": "no", **options.trainer}
            train(options.replace(**alone, trainer=trainer), callbacks=[callback], say=lambda line: None)
    except TrialEnded:
        return
    except Exception as error:
        tune.report({"score": WORST, "error": error_message(error)})
