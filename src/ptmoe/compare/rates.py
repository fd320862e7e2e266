"""Learning rates on equal terms (`ptmoe compare --search`): before its cells run, every method at every size is tried
on each task at a few rates, on validation examples.

    rates   r · f  for f in `search_factors`        r: the rate as the plan has it, by default the method's own
    score   of a rate: the mean over `search_seeds` trainings of `search_steps` steps, on `search_examples`

Trials are cells with other options, so they run wherever cells do. No trial reads test data (`evaluation_split`). What
each scored, and the rate that was chosen, is in `search.jsonl`; the plan stays as it is.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptmoe.compare.cells import Cell
from ptmoe.compare.executors import Executor
from ptmoe.compare.folder import ComparisonFolder
from ptmoe.compare.plan import ComparePlan
from ptmoe.compare.watcher import Watcher
from ptmoe.errors import DIVERGED, PtmoeError
from ptmoe.runs.folders import RESULT_FILE, SEARCH_FOLDER, file_name
from ptmoe.runs.records import EvaluationSummary, Result
from ptmoe.runs.searches import RateSearch, State, TrialRecord, mean_score
from ptmoe.train.examples import evaluation_split
from ptmoe.train.options import PLACES, TrainOptions

FIRST_SEED = 1000  # of the trials: no cell has it by default
SHORTER = 3  # a trial has a third of a cell's steps


@dataclass(frozen=True)
class Trial(Cell):
    """A short training at one learning rate, whose folder goes when its score is known."""

    @property
    def rate(self) -> float:
        assert self.options.learning_rate is not None
        return self.options.learning_rate

    @property
    def name(self) -> str:
        return f"{self.variant.label} on {self.task}, learning rate {self.rate:g}, seed {self.seed}"

    @property
    def place(self) -> Path:
        label, task = file_name(self.variant.label), file_name(self.task)
        return Path(SEARCH_FOLDER, label, task, f"{self.rate:g}", f"seed-{self.seed}")


def searches(plan: ComparePlan, cells: Iterable[Cell], known: Iterable[RateSearch]) -> list[tuple[RateSearch, Cell]]:
    """What is to be searched for these cells, as far as it is known, with the first cell of each.

    Raises:
        PtmoeError: trials have ended that were made otherwise than the plan says now: its file was edited.
    """
    before = {(search.label, search.task): search for search in known if search.settled}
    found: dict[tuple[str, str], tuple[RateSearch, Cell]] = {}
    for cell in cells:
        pair, given = (cell.variant.label, cell.task), cell.variant.learning_rate
        if not plan.search or given is None or pair in found:
            continue
        options = trial_options(plan, cell)
        fresh = RateSearch(
            label=cell.variant.label,
            method=cell.variant.config.method,
            task=cell.task,
            split=evaluation_split(options),
            examples=plan.search_examples,
            given=given,
            rates=[float(f"{given * factor:.3g}") for factor in plan.search_factors],
            seeds=list(range(FIRST_SEED, FIRST_SEED + plan.search_seeds)),
            options=options.model_dump(mode="json", exclude={"learning_rate", "seed", "output_dir"} | PLACES),
        )
        earlier = before.get(pair)
        if earlier is not None and (different := earlier.differences(fresh)):
            raise PtmoeError(
                f"the learning rate of {cell.variant.label} on {cell.task} was searched otherwise than the plan says "
                f"({'; '.join(different)}): put the plan back, or choose another --output-dir"
            )
        found[pair] = earlier or fresh, cell
    return list(found.values())


def trial_options(plan: ComparePlan, cell: Cell) -> TrainOptions:
    """What the trials of a search have in common."""
    own = {"validation_examples": plan.search_examples, "eval_task": None, **trial_length(plan)}
    return cell.options.replace(**own)


def trial_length(plan: ComparePlan) -> dict[str, float]:
    """The option that says how long a trial trains."""
    if plan.search_steps is None and plan.max_steps < 0:
        return {"num_train_epochs": plan.num_train_epochs / SHORTER}
    return {"max_steps": plan.search_steps or -(-plan.max_steps // SHORTER)}


def trials(plan: ComparePlan, search: RateSearch, cell: Cell) -> Iterator[Trial]:
    """Those that a search still needs."""
    options = trial_options(plan, cell)
    for seed in search.seeds:
        for rate in search.rates if search.chosen is None else ():
            if (rate, seed) not in search.settled:
                yield Trial(cell.variant, cell.task, (), seed, options.replace(learning_rate=rate, seed=seed))


def search_rates(
    plan: ComparePlan,
    cells: Sequence[Cell],
    data: Mapping[str, str],
    folder: ComparisonFolder,
    run: Executor,
    watcher: Watcher,
) -> list[Cell]:
    """Run the trials that these cells need, each of which goes to the folder's `search.jsonl` as it ends, and give each
    cell the rate that was chosen for it. A cell without one has failed, which is recorded, and is left out.

    Args:
        data: of each task that trials are trained on, the fingerprint of their examples.
    """
    known = {(search.label, search.task): search for search in folder.searches()}
    asked = searches(plan, cells, known.values())
    known |= {(search.label, search.task): search for search, _ in asked}
    todo = [trial for search, cell in asked for trial in trials(plan, search, cell)]
    with closing(run(todo, folder, watcher)) as outcomes:
        for cell, outcome in outcomes:
            search = known[cell.key[:2]]
            record = _record(search, cell, folder.run_folder(cell), outcome, data[cell.task])
            others = [trial for trial in search.trials if trial.settings != record.settings]
            known[cell.key[:2]] = search.model_copy(update={"trials": [*others, record]})
            folder.write_searches(known.values())
            watcher.ended(cell, outcome)
            shutil.rmtree(folder.run_folder(cell), ignore_errors=True)
    shutil.rmtree(folder.path / SEARCH_FOLDER, ignore_errors=True)
    for search, _ in asked:
        pair = search.label, search.task
        if search.chosen is None and known[pair].best is not None:
            known[pair] = known[pair].model_copy(update={"chosen": known[pair].best})
            watcher.note(_said(known[pair]))
    folder.write_searches(known.values())
    kept = []
    for cell in cells:
        chosen = known[cell.key[:2]].chosen if cell.key[:2] in known else cell.variant.learning_rate
        if cell.variant.is_base or chosen is not None:
            kept.append(replace(cell, options=cell.options.replace(learning_rate=chosen)))
        else:
            failed = _failed(known[cell.key[:2]])
            watcher.started(cell)
            folder.finish(cell, failed)
            watcher.ended(cell, failed)
    return kept


def _record(search: RateSearch, cell: Cell, run: Path, outcome: int | str, data: str) -> TrialRecord:
    settings = {"learning_rate": cell.options.learning_rate, "seed": cell.seed}
    order: list[Any] = [{"learning_rate": rate, "seed": seed} for seed in search.seeds for rate in search.rates]
    number = order.index(settings)
    if isinstance(outcome, int):
        try:
            score = mean_score(EvaluationSummary.read(path) for path in sorted((run / "eval").glob("*.json")))
            scores = [(Result.read(run / RESULT_FILE).steps, score)]
            return TrialRecord(number=number, settings=settings, scores=scores, state="finished", data=data)
        except (PtmoeError, ZeroDivisionError) as error:
            outcome = f"its score cannot be read: {error}"
    state: State = "diverged" if outcome.startswith(DIVERGED) else "failed"
    return TrialRecord(number=number, settings=settings, scores=[], state=state, error=outcome, data=data)


def _said(search: RateSearch) -> str:
    scores = ", ".join(f"{rate:g} {mean:.1f} %" for rate, mean in search.means.items())
    text = f"{search.label} on {search.task}: learning rate {search.chosen:g} ({scores} on validation examples)"
    if search.edge is None:
        return text
    return f"{text}. It is the {search.edge} of its grid, and a better one may lie beyond: widen --search-factors"


def _failed(search: RateSearch) -> str:
    """Why no rate was chosen."""
    errors = [trial.error for trial in search.trials if trial.state == "failed"]
    if errors:
        return f"its search: {len(errors)} trial(s) failed, and the same command runs them again: {errors[0]}"
    return "its search: at every learning rate the loss became NaN or infinite with some seed: lower --search-factors"
