"""Looking for settings: trials of one training with different values, those that fall behind stopped early (ASHA).

    ptmoe tune --task gsm8k --trials 20 --search learning_rate=0.001..0.1 --search rank=8,16,36

A trial's score is that of examples of the training split which no trial trains on; the test split stays unseen. The
trials follow from the seed, and what each scored is kept in `trials.jsonl`: the same command finishes what was broken
off. Ray keeps its own records in pickles, which are deleted with its folder and never read.
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from ptmoe.compare.on_ray import LOCAL, NEAREST, RETRIES, check_place, session
from ptmoe.errors import PtmoeError, near
from ptmoe.runs.folders import BEST_FILE, TRIALS_FILE, TUNE_FILE, writing
from ptmoe.runs.records import State, TrialRecord, write_lines
from ptmoe.settings import Flag
from ptmoe.tasks import Problems
from ptmoe.train.options import Count, TrainOptions, method_config, scalar

RANGE = re.compile(r"([\d.eE+-]+?)\.\.([\d.eE+-]+)")
REDUCTION = 3  # of the trials that come so far, ASHA lets one in three go on
STORAGE = ".ray"


def _search(value: Any) -> Any:
    """`rank=4,8`, or several such texts, as a mapping; of each field a list of values, or a range as text."""
    if isinstance(value, str | list | tuple):
        texts = [value] if isinstance(value, str) else value
        pairs = [str(text).partition("=") for text in texts]
        if wrong := next((text for text, pair in zip(texts, pairs, strict=True) if not pair[2]), None):
            raise ValueError(f"search {wrong!r}: needs FIELD=LOW..HIGH or FIELD=VALUE,VALUE,…")
        value = {field.strip(): text for field, _, text in pairs}
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for field, text in value.items():
        if isinstance(text, str) and (ends := RANGE.fullmatch(text.strip())):
            low, high = (scalar(end) for end in ends.groups())
            if not all(isinstance(end, int | float) for end in (low, high)) or not low < high:
                raise ValueError(f"search {field}={text}: needs two numbers, the lower one first")
            found[str(field)] = text.strip()
        else:
            found[str(field)] = [scalar(part) for part in text.split(",")] if isinstance(text, str) else text
    return found


class TunePlan(TrainOptions):
    """A search. Each field is an option of `ptmoe tune`, which are those of `ptmoe train` and its own."""

    unwritten: ClassVar[set[str]] = {"output_dir", "jobs", "on", "gpus_per_trial"}

    search: Annotated[
        dict[str, str | Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_search), Flag(repeatable=True)
    ] = {}
    """a field of the method, or of the training, and where to look: rank=4,8,16 or learning_rate=0.001..0.1; several
    times; by default the learning rate, and the router's noise and the rank of methods that have them"""
    trials: Count = 20
    """how many; the first has the settings as they are given, the others are drawn at random"""
    evaluations: Count = 9
    """validations of a trial, evenly over its steps; after the 1st, 3rd, 9th, … only the best third goes on"""
    validation_examples: Count = 200
    """the last N of the training examples: trials are scored on them, and train on the others"""
    on: str = LOCAL
    """where trials run: ray, which starts Ray on this machine; or ray://auto, the Ray cluster that this machine belongs
    to, whose machines share the output folder"""
    jobs: Count | None = None
    """trials at once; by default as many as there is room for, on this machine without a GPU 1"""
    gpus_per_trial: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    """0.25 lets four trials share a GPU; by default 1 where there are any"""

    def trial(self, settings: dict[str, Any], **changes: Any) -> TrainOptions:
        """The training with some of its settings replaced; those that are none of its own are the method's."""
        own = {name: getattr(self, name) for name in TrainOptions.model_fields}
        for name, value in settings.items():
            if name in TrainOptions.model_fields:
                own[name] = value
            else:
                own["method"] = {**own["method"], name: value}
        return TrainOptions(**{**own, **changes})


def read_plan(path: Path | None, changes: dict[str, Any]) -> TunePlan:
    """From a YAML file, or of a folder, whose search is then continued; `changes` take precedence.

    Raises:
        PtmoeError: no such file, or an unknown key or unfit value.
    """
    if path is None:
        return TunePlan(**changes)
    if path.is_dir():
        return TunePlan.read(path / TUNE_FILE, **{"output_dir": str(path), **changes})
    return TunePlan.read(path, **changes)


def resolved(plan: TunePlan) -> TunePlan:
    """With the learning rate, and with the fields to search.

    Raises:
        PtmoeError: Ray is not installed, or a field that neither the method nor the training has.
    """
    if plan.on not in (LOCAL, NEAREST):
        raise PtmoeError(f"on {plan.on!r}: a search runs on ray, or with ray://auto on a machine of the cluster")
    check_place(plan.on)
    config = method_config(plan.method)
    plan = plan.replace(learning_rate=plan.learning_rate or config.default_learning_rate)
    search = plan.search or _usual(config, float(plan.learning_rate or 0))
    known = {**type(config).model_fields, **TrainOptions.model_fields}
    kept = {"method", "task", "data", "model", "output_dir", "max_steps", "num_train_epochs", "max_examples", "trainer"}
    for field in search:
        if field not in known or field in kept:
            raise PtmoeError(f"search: {config.method} has no {field!r} to vary{near(field, known.keys() - kept)}")
    plan = plan.replace(search=search)
    for settings in drawn(plan):
        method_config(plan.trial(settings).method)  # a value that does not fit is reported before a trial starts
    return plan


def _usual(config: Any, rate: float) -> dict[str, Any]:
    search: dict[str, Any] = {"learning_rate": f"{rate / 10:g}..{rate * 10:g}"}
    fields = type(config).model_fields
    if "router_noise" in fields:
        search["router_noise"] = [0.0, 0.05, 0.1, 0.2]
    if "rank" in fields:
        search["rank"] = sorted({max(1, config.rank // part) for part in (1, 2, 4)} | {config.rank})
        if search["rank"] == [1]:
            search["rank"] = [1, 2, 4]
    return search


def drawn(plan: TunePlan) -> list[dict[str, Any]]:
    """The settings of each trial, the same for the same plan; the first replaces none."""
    chance, found = random.Random(plan.seed), list[dict[str, Any]]([{}])
    for _ in range(1, plan.trials):
        found.append({field: _draw(chance, values) for field, values in plan.search.items()})
    return found


def _draw(chance: random.Random, values: str | list[Any]) -> Any:
    """One of the values, or a number of the range: by its logarithm where the range goes over more than a decade."""
    if isinstance(values, list):
        return chance.choice(values)
    ends = RANGE.fullmatch(values)
    assert ends is not None
    low, high = (scalar(end) for end in ends.groups())
    if low > 0 and high >= 10 * low:
        value = math.exp(chance.uniform(math.log(low), math.log(high)))
    else:
        value = chance.uniform(low, high)
    whole = isinstance(low, int) and isinstance(high, int)
    return min(high, max(low, round(value))) if whole else float(f"{value:.3g}")


def count_examples(plan: TunePlan, say: Callable[[str], None]) -> int:
    """How many examples there are to train and to validate on.

    Raises:
        PtmoeError: missing or bad data, or no more than half of them would be left to train on.
    """
    from ptmoe.train.examples import training_examples

    limit = None if plan.max_examples is None else plan.max_examples + plan.validation_examples
    options = plan.trial({}, max_examples=None)
    problems = Problems(skip=plan.skip_bad, at_once=plan.data is None)
    count = sum(1 for _ in islice(training_examples(options, problems, say), limit))
    if count < 2 * plan.validation_examples:
        raise PtmoeError(
            f"{count:,} examples, and {plan.validation_examples:,} of them are to validate on: lower "
            f"--validation-examples to {count // 2:,} or less"
            if count > 1
            else "one example: a search needs some to train and others to validate on"
        )
    return count


def tune(plan: TunePlan, folder: Path, *, say: Callable[[str], None] = print) -> list[TrialRecord]:
    """Run the trials that are not finished, and write the best settings to `best.yaml`, which `ptmoe train` takes.

    Args:
        plan: from `resolved`.
        folder: of the search; `plan`'s, or a new one.
        say: gets a line for each trial that ends.

    Returns:
        All trials in their order.

    Raises:
        PtmoeError: the folder holds another search, Ray cannot be had, or the data cannot.
    """
    from ptmoe.compare.trials import trial

    if (folder / TUNE_FILE).is_file():
        before = TunePlan.read(folder / TUNE_FILE)
        names = [name for name in TunePlan.model_fields if name not in plan.unwritten]
        if other := [name for name in names if getattr(before, name) != getattr(plan, name)]:
            raise PtmoeError(f"{folder} holds another search ({', '.join(other)}): choose another --output-dir")
    elif folder.exists() and any(folder.glob("[!.]*")):
        raise PtmoeError(f"{folder} holds something other than a search: choose another --output-dir")
    examples, settings = count_examples(plan, say), drawn(plan)
    with writing(folder, "another ptmoe tune is running in"):
        path = folder / TRIALS_FILE
        known = {record.number: record for record in (TrialRecord.read_lines(path) if path.exists() else [])}
        todo = [number for number in range(plan.trials) if number not in known or known[number].state == "failed"]
        if todo:
            known = {number: record for number, record in known.items() if number not in todo}
            with session(plan.on, plan.jobs or 1, plan.jobs, plan.gpus_per_trial) as room:
                plan.write(folder / TUNE_FILE)
                _fit(room, plan, folder, trial, examples, settings, known, say)
        records = [known[number] for number in sorted(known)]
        scored = [record for record in records if record.state != "failed"]
        if scored:
            best = plan.trial(best_of(scored).settings)
            best.write(folder / BEST_FILE)
    return records


def best_of(records: Sequence[TrialRecord]) -> TrialRecord:
    """The trial with the highest last score among those that came furthest; the first of equal ones."""
    furthest = max(len(record.scores) for record in records)
    return max(
        (record for record in records if len(record.scores) == furthest), key=lambda record: record.scores[-1][1]
    )


def _fit(
    room: Any,
    plan: TunePlan,
    folder: Path,
    trial: Callable[..., None],
    examples: int,
    settings: list[dict[str, Any]],
    known: dict[int, TrialRecord],
    say: Callable[[str], None],
) -> None:
    """Run the trials that `known` lacks, and add them to it; the known ones tell ASHA again what they scored."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    class Records(ray_tune.Callback):
        def __init__(self) -> None:
            self.scores: dict[int, list[tuple[int, float]]] = {}
            self.errors: dict[int, str] = {}
            self.whole: set[int] = set()  # that trained to their end

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.scores[trial.config["number"]] = []  # or one whose machine died is there twice

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
            number = trial.config["number"]
            if "error" in result:
                self.errors[number] = result["error"]
            elif "step" in result:
                self.scores.setdefault(number, []).append((result["step"], result["score"]))
                self.whole |= {number} if result["last"] else set()

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.ended(trial.config["number"])

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            number = trial.config["number"]
            self.errors.setdefault(number, f"its process or its machine died {1 + RETRIES} times")
            self.ended(number)

        def ended(self, number: int) -> None:
            if number in known:
                return
            scores, error = self.scores.get(number, []), self.errors.get(number)
            state: State = "failed" if error or not scores else "finished" if number in self.whole else "stopped"
            known[number] = TrialRecord(
                number=number, settings=settings[number], scores=scores, state=state, error=error
            )
            write_lines(folder / TRIALS_FILE, [known[each] for each in sorted(known)])
            values = ", ".join(f"{name}={value}" for name, value in settings[number].items()) or "as given"
            last = f"{scores[-1][1]:.1f} % at step {scores[-1][0]:,}" if scores else ""
            say(f"trial {number} ({values}): {state}{', ' if error or last else ''}{error or last}")

    shutil.rmtree(folder / STORAGE, ignore_errors=True)
    told = {number: record.scores for number, record in known.items()}
    plain = {**plan.model_dump(), "output_dir": None}
    trainable = ray_tune.with_parameters(trial, plan=plain, examples=examples, settings=settings, known=told)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray_tune.Tuner(
            ray_tune.with_resources(trainable, {"cpu": 1, "gpu": room.gpus}),
            param_space={"number": ray_tune.grid_search(list(range(plan.trials)))},
            tune_config=ray_tune.TuneConfig(
                metric="score",
                mode="max",
                scheduler=ASHAScheduler(max_t=plan.evaluations, grace_period=1, reduction_factor=REDUCTION),
                max_concurrent_trials=room.jobs,
            ),
            run_config=ray_tune.RunConfig(
                name="tune",
                storage_path=str((folder / STORAGE).resolve()),
                failure_config=ray_tune.FailureConfig(max_failures=RETRIES),
                callbacks=[Records()],
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(folder / STORAGE, ignore_errors=True)
        with suppress(ValueError):  # not the main thread, where there are none
            for number, handler in handlers.items():
                signal.signal(number, handler)
