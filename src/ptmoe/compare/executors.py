"""Where cells run: in this process, in processes of this machine, or on Ray.

An executor is called with cells and gives each back once, as it ends, with its number of trainable parameters or what
went wrong. By then the cell's run folder is as the cell left it, all but `cell.json`, which the caller writes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr
from functools import partial
from typing import TypeAlias

from ptmoe.compare import workers
from ptmoe.compare.cells import Cell
from ptmoe.compare.folder import ComparisonFolder
from ptmoe.compare.plan import ComparePlan
from ptmoe.compare.watcher import Outcomes, Watcher
from ptmoe.runs.folders import LOG_FILE

Executor: TypeAlias = Callable[[Sequence[Cell], ComparisonFolder, Watcher], Outcomes]


@contextmanager
def executor(plan: ComparePlan, jobs: int) -> Iterator[Executor]:
    """The executor that a plan asks for, ready to run, on this machine with `jobs` cells at once; what it started ends
    with the block.

    Raises:
        PtmoeError: Ray is not installed, its address does not answer, or it has no room for a cell.
    """
    if plan.on != "processes":
        from ptmoe.compare.on_ray import run_cells
        from ptmoe.compare.ray_session import session

        with session(plan.on, jobs, plan.jobs, plan.gpus_per_cell) as room:
            yield partial(run_cells, room)
    elif jobs == 1:
        yield inline
    else:
        yield partial(processes, jobs)


def inline(cells: Sequence[Cell], folder: ComparisonFolder, watcher: Watcher) -> Outcomes:
    """One cell after the other, in this process."""
    for cell in cells:
        with (folder.path / LOG_FILE).open("a") as printed, redirect_stderr(printed):
            outcome = _attempt(folder, watcher, workers.run_cell, cell)
        yield cell, outcome


def processes(jobs: int, cells: Sequence[Cell], folder: ComparisonFolder, watcher: Watcher) -> Outcomes:
    """In so many processes, each of which runs one cell after the other."""
    own = workers.Workers(jobs, folder.path / LOG_FILE)
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(_attempt, folder, watcher, own.run, cell): cell for cell in cells}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        own.stop()


def _attempt(folder: ComparisonFolder, watcher: Watcher, run: Callable[..., int], cell: Cell) -> int | str:
    watcher.started(cell)
    try:
        return run(
            cell.options.replace(output_dir=str(folder.run_folder(cell))),
            lambda done, steps, loss: watcher.step(cell, done, steps, loss),
            lambda text: watcher.message(cell, text),
        )
    except Exception as error:
        return workers.error_message(error)
