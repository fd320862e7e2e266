"""Running a plan: finished cells are kept, interrupted ones go on from their last checkpoint, failed ones are reported
while others run."""

import os
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ptmoe import nano
from ptmoe.compare.cells import Cell, LeftOut, Variant, available, cells_of, check_names, trainable_tasks, variants
from ptmoe.compare.executors import Executor, executor, inline
from ptmoe.compare.folder import ComparisonFolder
from ptmoe.compare.plan import ComparePlan
from ptmoe.compare.rates import Trial, search_rates, searches, trial_options, trials
from ptmoe.compare.ray_session import LOCAL, check_place
from ptmoe.compare.watcher import Watcher
from ptmoe.errors import PtmoeError
from ptmoe.models.bases import check_quantization, commit_of, load_config
from ptmoe.runs.folders import PLAN_FILE
from ptmoe.runs.records import Failure
from ptmoe.runs.searches import check_data
from ptmoe.settings import LARGEST_YAML
from ptmoe.train.arguments import check_arguments
from ptmoe.train.examples import examples_fingerprint, forgetting_examples
from ptmoe.train.options import PLACES

MOST_JOBS = 8  # by default; each loads the base once more


@dataclass(frozen=True)
class Comparison:
    """A resolved plan and its cells."""

    plan: ComparePlan  # what was asked for, with all settings of every method
    whole: ComparePlan  # `plan` and what was compared in the same folder before
    folder: ComparisonFolder
    cells: tuple[Cell, ...]  # of `plan`, in the order they are run
    variants: tuple[Variant, ...]  # of `plan`
    left_out: tuple[LeftOut, ...]  # what cannot be run
    before: str | None  # the text of the folder's plan when `whole` was made of it
    data: Mapping[str, str] = field(default_factory=dict)  # of the tasks searched for, the examples' fingerprints

    @property
    def unfinished(self) -> list[Cell]:
        return [cell for cell in self.cells if not self.folder.is_finished(cell)]

    @property
    def trials(self) -> list[Trial]:
        """Of the search for learning rates, those that the unfinished cells wait for."""
        asked = searches(self.plan, self.unfinished, self.folder.searches())
        return [trial for search, cell in asked for trial in trials(self.plan, search, cell)]

    @property
    def jobs(self) -> int:
        """How many cells run at once on this machine, unless it has GPUs and Ray gives each cell its own."""
        usual = min(os.cpu_count() or 1, MOST_JOBS) if self.plan.model == nano.NAME else 1
        return min(self.plan.jobs or usual, max(1, len(self.unfinished), len(self.trials)))


def prepare(plan: ComparePlan, *, say: Callable[[str], None] = print, data: bool = True) -> Comparison:
    """Resolve a plan to its cells; nothing is written but downloaded data.

    Args:
        say: called with a line for each download.
        data: check that the data is there.

    Raises:
        PtmoeError: an unknown model, method, task or option; no data; a folder of another comparison, with a cell that
            was trained otherwise or on other data, or with such a search; a plan too large to be read again; no cell
            that can be run, or with `strict` one that cannot; Ray, where it is asked for and not installed.
    """
    check_place(plan.on)
    check_quantization(plan.quantization)
    plan = plan.replace(revision=commit_of(plan.model, plan.revision))
    config = load_config(plan.model, revision=plan.revision)
    tasks, left_out = trainable_tasks(plan)
    if tasks:
        plan = plan.replace(tasks=tasks)
        if data:
            plan, missing = available(plan, say)
            left_out += missing
    folder = ComparisonFolder(Path(plan.output_dir or Path("runs") / _folder_name(plan)))
    before, written = folder.plan(), folder.written()
    known, gone = list[Variant](), list[LeftOut]()  # in the folder's plan, the latter not as this version can run it
    if before is not None:
        # Without a look at the data it is not known which of a preset's evaluations there are.
        unchecked = not data and plan.preset is not None
        asked = plan.replace(eval_tasks=before.eval_tasks) if unchecked else plan
        if different := before.differences(asked):
            raise PtmoeError(
                f"{folder.path} holds another comparison ({'; '.join(different)}): choose another --output-dir"
            )
        known, gone = variants(before, config)
    chosen, unfit = variants(plan, config, known)
    left_out += unfit
    if left_out and (plan.strict or not chosen or not tasks):
        why = "strict, and this cannot be run" if plan.strict else "no cell is left"
        raise PtmoeError(f"{why}: {'; '.join(map(str, left_out))}")
    left_out += gone
    entries = {variant.label: variant.entry() for variant in (*known, *chosen)}
    methods = [entries[variant.label] for variant in chosen]
    whole = plan = plan.replace(methods=methods, vary={}, budget=[], learning_rate=None)
    if before is not None:
        whole = plan.replace(
            preset=before.preset,
            title=plan.title or before.title,
            methods=list(entries.values()),
            tasks=list(dict.fromkeys([*before.tasks, *plan.tasks])),
            seeds=list(dict.fromkeys([*before.seeds, *plan.seeds])),
        )
        check_names(whole.tasks)
    if (size := len(whole.text().encode())) > LARGEST_YAML:
        raise PtmoeError(
            f"the plan of {folder.path} would have {size:,} bytes, and none with more than {LARGEST_YAML:,} is read "
            "again: compare fewer methods, values or seeds in one folder"
        )
    cells = tuple(cells_of(plan, chosen, config))
    known_searches = folder.searches() if plan.search else []
    chosen_rates = {(each.label, each.task): each.chosen for each, _ in searches(plan, cells, known_searches)}
    for cell in filter(folder.is_finished, cells):
        rate = chosen_rates.get(cell.key[:2], cell.options.learning_rate)  # None where its search is not there any more
        if different := folder.differences(replace(cell, options=cell.options.replace(learning_rate=rate))):
            raise PtmoeError(
                f"{folder.run_folder(cell)} was trained otherwise than the plan says ({'; '.join(different)}): choose "
                "another --output-dir, or delete the cells that are to be trained again"
            )
    comparison = Comparison(plan, whole, folder, cells, tuple(chosen), tuple(dict.fromkeys(left_out)), written)
    forgetting_examples(plan)
    for cell in {
        cell.variant.config.method: cell for cell in comparison.unfinished if not cell.variant.is_base
    }.values():
        check_arguments(cell.options, cell.variant.config, here=plan.on in ("processes", LOCAL))
    todo = comparison.unfinished
    # Nothing is read for finished cells alone, unless other places are given, which the plan then has.
    moved = before is not None and plan.model_dump(include=PLACES) != before.model_dump(include=PLACES)
    for cell in {cell.task: cell for cell in (cells if moved else todo)}.values() if data else ():
        folder.check_data(cell, say)
    searched = {cell.task: trial_options(plan, cell) for _, cell in searches(plan, todo, known_searches)}
    fingerprints = {task: examples_fingerprint(options, say) for task, options in searched.items() if data}
    for search in known_searches:
        if search.task in fingerprints:
            check_data(search.trials, fingerprints[search.task], folder.path, search.task)
    return replace(comparison, data=fingerprints)


def _folder_name(plan: ComparePlan) -> str:
    if plan.preset is not None:
        return f"{plan.preset}-{Path(plan.model).name}"
    return f"compare-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def compare(comparison: Comparison, watcher: Watcher | None = None) -> list[Failure]:
    """Run the cells of a comparison from `prepare` that are not finished.

    After an interruption the same plan resumes: finished cells stay, the others go on from their last checkpoint, where
    they have one.

    Returns:
        The cells of the plan that failed.

    Raises:
        PtmoeError: another command is using the folder or has changed its plan, its failures are damaged, or Ray
            cannot be had as the plan asks.
    """
    watcher = watcher or Watcher()
    folder = comparison.folder
    with folder.held():
        if folder.written() not in (comparison.before, comparison.whole.text()):
            raise PtmoeError(f"another command has changed {folder.path / PLAN_FILE}: give the command again")
        folder.failures()  # where it is damaged, that is said before a cell is trained
        cells = comparison.unfinished
        chosen = executor(comparison.plan, comparison.jobs) if cells else nullcontext[Executor](inline)
        with chosen as run:
            comparison.whole.write(folder.path / PLAN_FILE)
            if comparison.plan.search and cells:
                cells = search_rates(comparison.plan, cells, comparison.data, folder, run, watcher)
            with closing(run(cells, folder, watcher)) as outcomes:
                for cell, outcome in outcomes:
                    folder.finish(cell, outcome)
                    watcher.ended(cell, outcome)
        planned = {cell.key for cell in comparison.cells}
        return [failure for failure in folder.failures() if failure.cell in planned]
