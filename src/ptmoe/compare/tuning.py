"""Looking for settings: trials of one training with different values, those that fall behind stopped early (ASHA).

    ptmoe tune --task gsm8k --trials 20 --search learning_rate=0.001..0.1 --search rank=8,16,36

A trial's score is that of the validation split, or of examples of the training split which no trial trains on; the test
split stays unseen. The trials follow from the seed, and what each scored is kept in `trials.jsonl`: the same command
finishes what was interrupted. Ray keeps its own records in pickles, which are deleted with its folder and never read.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ptmoe.compare.on_ray import RETRIES
from ptmoe.compare.ray_session import session, signals_kept
from ptmoe.compare.search import TunePlan, drawn
from ptmoe.errors import PtmoeError
from ptmoe.runs.folders import BEST_FILE, TRIALS_FILE, TUNE_FILE, writing
from ptmoe.runs.records import write_lines
from ptmoe.runs.searches import State, TrialRecord, check_data
from ptmoe.settings import differences
from ptmoe.train.examples import examples_fingerprint
from ptmoe.train.options import PLACES

REDUCTION = 3  # of the trials that come so far, ASHA lets one in three go on
STORAGE = ".ray"


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
    if (folder / TUNE_FILE).is_file():
        _check(plan, folder, [_settled(TunePlan.read(folder / TUNE_FILE))])
    elif folder.exists() and any(folder.glob("[!.]*")):
        raise PtmoeError(f"{folder} holds something other than a search: choose another --output-dir")
    data, settings = examples_fingerprint(plan.trial({}), say), drawn(plan)
    with writing(folder, "another ptmoe tune is running in"):
        path = folder / TRIALS_FILE
        known = {record.number: record for record in TrialRecord.read_lines(path)}
        todo = [number for number in range(plan.trials) if number not in known or known[number].state == "failed"]
        # The file of the plan may have been edited since.
        _check(plan, folder, [known[number].plan for number in known.keys() - todo])
        check_data(known.values(), data, folder, str(plan.data or plan.task))
        if todo:
            known = {number: record for number, record in known.items() if number not in todo}
            with session(plan.on, plan.jobs or 1, plan.jobs, plan.gpus_per_trial) as room:
                plan.write(folder / TUNE_FILE)
                _fit(room, plan, folder, settings, known, data, say)
        records = [known[number] for number in sorted(known)]
        scored = [record for record in records if record.state != "failed"]
        if scored:
            best = plan.trial(best_of(scored).settings, validation_examples=None)
            best.write(folder / BEST_FILE)
    return records


def best_of(records: Sequence[TrialRecord]) -> TrialRecord:
    """The trial with the highest last score among those that trained to their end or, where none did, that came
    furthest; the first of equal ones. Trials of few steps, as with large batches, end after fewer scores."""
    furthest = max(len(record.scores) for record in records)
    finished = [record for record in records if record.state == "finished"]
    far = finished or [record for record in records if len(record.scores) == furthest]
    return max(far, key=lambda record: record.scores[-1][1])


def _settled(plan: TunePlan) -> dict[str, Any]:
    """What the trials of a search have in common, and what a resumed one may not change; data may have been moved."""
    return plan.model_dump(mode="json", exclude=plan.unwritten | PLACES | {"trials"})


def _check(plan: TunePlan, folder: Path, earlier: Iterable[dict[str, Any] | None]) -> None:
    now = _settled(plan)
    for before in filter(None, earlier):
        if changed := differences((name, before.get(name, value), value) for name, value in now.items()):
            raise PtmoeError(f"{folder} holds another search ({'; '.join(changed)}): choose another --output-dir")


def _fit(
    room: Any,
    plan: TunePlan,
    folder: Path,
    settings: list[dict[str, Any]],
    known: dict[int, TrialRecord],
    data: str,
    say: Callable[[str], None],
) -> None:
    """Run the trials that `known` lacks, and add them to it; the known ones tell ASHA again what they scored."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    from ptmoe.compare.trials import Results, trial

    def ended(number: int, scores: list[tuple[int, float]], whole: bool, error: str | None) -> None:
        if number in known:
            return
        state: State = "failed" if error or not scores else "finished" if whole else "stopped"
        known[number] = TrialRecord(
            number=number,
            settings=settings[number],
            scores=scores,
            state=state,
            error=error,
            data=data,
            plan=_settled(plan),
        )
        write_lines(folder / TRIALS_FILE, [known[each] for each in sorted(known)])
        values = ", ".join(f"{name}={value}" for name, value in settings[number].items()) or "as given"
        last = f"{scores[-1][1]:.1f} % at step {scores[-1][0]:,}" if scores else "no score"
        say(f"trial {number} ({values}): {state}, {error or last}")

    shutil.rmtree(folder / STORAGE, ignore_errors=True)
    told = {number: record.scores for number, record in known.items()}
    plain = {**plan.model_dump(), "output_dir": None}
    trainable = ray_tune.with_parameters(trial, plan=plain, settings=settings, known=told, place=os.getcwd())
    try:
        with signals_kept():
            ray_tune.Tuner(
                ray_tune.with_resources(trainable, {"cpu": 1, "gpu": room.gpus}),
                param_space={"number": ray_tune.grid_search(list(range(plan.trials)))},
                tune_config=ray_tune.TuneConfig(
                    metric="score",
                    mode="max",
                    scheduler=ASHAScheduler(max_t=plan.evaluations, grace_period=1, reduction_factor=REDUCTION),
                    max_concurrent_trials=room.jobs,
                    reuse_actors=True,  # and with them the libraries; a stopped trial ends in its next report
                ),
                run_config=ray_tune.RunConfig(
                    name="tune",
                    storage_path=str((folder / STORAGE).resolve()),
                    failure_config=ray_tune.FailureConfig(max_failures=RETRIES),
                    callbacks=[Results(ended)],
                    verbose=0,
                ),
            ).fit()
    finally:
        shutil.rmtree(folder / STORAGE, ignore_errors=True)
