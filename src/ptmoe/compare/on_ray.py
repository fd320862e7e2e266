"""Cells in Ray's actors.

An actor takes one cell after the other. It trains in a folder of its own machine and sends all files back, which the
comparison alone writes: no shared folder is needed, and an actor that is thought dead and is not can write nothing. A
cell whose actor dies is run again, on any machine that has room.

What a worker imports to find its class is little: threads are set before torch is there.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe import __version__
from ptmoe.errors import PtmoeError
from ptmoe.files import append, naming

if TYPE_CHECKING:
    from ptmoe.compare.cells import Cell
    from ptmoe.compare.folder import ComparisonFolder
    from ptmoe.compare.ray_session import Room
    from ptmoe.compare.watcher import Outcomes, Watcher

RETRIES = 3  # of a cell whose process or machine dies
NEWS_SECONDS = 2.0  # between two reports of an actor's steps
RESTART_SECONDS = 0.5  # between two looks at an actor that starts again
QUIET_SECONDS = 60.0  # until it is said that Ray has no room


class CellActor:
    """Runs one cell after the other; the second of its threads answers `news`."""

    def __init__(self, name: str, folder: str) -> None:
        self.folder = Path(tempfile.gettempdir(), f"ptmoe-{name}")  # the process that takes over finds it
        self.reports: list[tuple[Any, ...]] = []
        self.steps: dict[int, tuple[Any, ...]] = {}
        self.lock, self.turn, self.happened = threading.Lock(), threading.Lock(), threading.Event()
        if Path(folder).is_dir():
            os.chdir(folder)  # where the names of files in a plan start

    def ready(self, version: str) -> str | None:
        """Prepare to run cells; what makes that impossible, or None."""
        if version != __version__:
            return f"ptmoe is {__version__} on {socket.gethostname()} and {version} here: install one version on both"
        self.prepare()
        return None

    def prepare(self) -> None:
        import ptmoe.train.recipe  # noqa: F401  takes seconds, like what it imports

    def run(self, number: int, options: dict[str, Any], place: str) -> tuple[int | str, dict[str, Any], str]:
        """Run a cell, which `news` names by its number. Its options have no folder; messages name `place`, its folder
        to be.

        Returns:
            The number of trainable parameters or what went wrong; the bytes of each file; what was printed.
        """
        with self.turn:  # where the connection alone was lost, the cell that was given up still runs
            return self._run(number, options, place)

    def _run(self, number: int, options: dict[str, Any], place: str) -> tuple[int | str, dict[str, Any], str]:
        import numpy as np

        from ptmoe.compare import workers
        from ptmoe.train.options import TrainOptions

        shutil.rmtree(self.folder, ignore_errors=True)
        run = self.folder / "run"
        printed = io.StringIO()
        outcome: int | str
        with redirect_stderr(printed):
            try:
                outcome = workers.run_cell(
                    TrainOptions(**options).replace(output_dir=str(run)),
                    lambda *step: self._report("step", number, *step),
                    lambda text: self._report("message", number, text.replace(str(run), place)),
                )
            except Exception as error:
                outcome = workers.error_message(error).replace(str(run), place)
        paths = [path for path in run.rglob("*") if path.is_file()]
        files = {path.relative_to(run).as_posix(): np.fromfile(path, dtype=np.uint8) for path in paths}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.happened.set()
        return outcome, files, printed.getvalue()

    def _report(self, kind: str, number: int, *what: Any) -> None:
        with self.lock:
            if kind == "step":
                self.steps[number] = (kind, number, *what)  # the last is enough
            else:
                self.reports.append((kind, number, *what))
                self.happened.set()

    def news(self) -> list[tuple[Any, ...]]:
        """What has happened since the last call; waits for a message, the end of a cell, or a while."""
        self.happened.wait(NEWS_SECONDS)
        with self.lock:
            self.happened.clear()
            told = [*self.reports, *self.steps.values()]
            self.reports, self.steps = [], {}
        return told


def run_cells(room: Room, cells: Sequence[Cell], folder: ComparisonFolder, watcher: Watcher) -> Outcomes:
    """In actors; the files of each cell are written here.

    Raises:
        PtmoeError: a machine's `ptmoe` is missing or another one.
    """
    ray = room.ray
    made = ray.remote(CellActor).options(
        num_cpus=1, num_gpus=room.gpus, max_restarts=-1, max_task_retries=0, max_concurrency=2
    )
    actors = [made.remote(secrets.token_hex(8), os.getcwd()) for _ in range(min(room.jobs, len(cells)))]
    starting = {actor.ready.remote(__version__): place for place, actor in enumerate(actors)}
    running: dict[Any, tuple[int, int]] = {}  # the actor's place in the list, and the cell's
    asked: dict[Any, int] = {}
    waiting, idle, patience = deque(range(len(cells))), set[int](), QUIET_SECONDS
    gone: dict[int, float] = {}  # since when an actor does not answer
    deaths: Counter[int] = Counter()  # of processes, by the cell that they ran; Ray itself would count what is no death

    def give(place: int) -> None:
        if not waiting:
            idle.add(place)
            return
        number = waiting.popleft()
        if not deaths[number]:
            watcher.started(cells[number])
        options, name = cells[number].options.model_dump(), str(folder.run_folder(cells[number]))
        running[actors[place].run.remote(number, options, name)] = place, number

    def tell(ref: Any) -> None:
        with suppress(ray.exceptions.RayError):  # its process died, and another one takes over
            for kind, number, *what in ray.get(ref):
                if kind == "message":
                    watcher.message(cells[number], *what)
                elif number in (other for _, other in running.values()):  # or it has ended
                    watcher.step(cells[number], *what)

    try:
        while waiting or running:
            done, _ = ray.wait([*starting, *running, *asked], timeout=patience)
            if not done and not running and patience == QUIET_SECONDS:
                watcher.message(cells[waiting[0]], "waits: Ray has no room for it yet")
                patience = 10 * QUIET_SECONDS
            for ref in done:
                if ref in starting:
                    place = starting.pop(ref)
                    try:
                        if problem := ray.get(ref):
                            raise PtmoeError(problem)
                    except ray.exceptions.ActorUnavailableError as error:  # it died meanwhile, and starts again
                        if time.monotonic() - gone.setdefault(place, time.monotonic()) > 2 * QUIET_SECONDS:
                            raise PtmoeError(_why_not(error)) from None
                        time.sleep(RESTART_SECONDS)
                        starting[actors[place].ready.remote(__version__)] = place
                    except ray.exceptions.RayError as error:
                        raise PtmoeError(_why_not(error)) from None
                    else:
                        gone.pop(place, None)
                        give(place)
                        if place not in asked.values():
                            asked[actors[place].news.remote()] = place
                elif ref in asked:
                    place = asked.pop(ref)
                    tell(ref)
                    if place in (other for other, _ in running.values()):
                        asked[actors[place].news.remote()] = place
                    elif place in idle:  # a cell whose machine is gone may need its room
                        ray.kill(actors[place])
                else:
                    place, number = running.pop(ref)
                    outcome = _received(ray, ref, folder, cells[number])
                    if outcome is None:
                        deaths[number] += 1
                        starting[actors[place].ready.remote(__version__)] = place
                        if deaths[number] <= RETRIES:
                            watcher.message(cells[number], "starts again: its process or its machine died")
                            waiting.appendleft(number)
                            continue
                        outcome = f"its process or its machine died {deaths[number]} times"
                    else:
                        give(place)  # before the caller has the outcome, so that it does not idle meanwhile
                    yield cells[number], outcome
        for ref in ray.wait([*asked], num_returns=len(asked), timeout=2 * NEWS_SECONDS)[0] if asked else ():
            tell(ref)
    finally:
        for actor in actors:
            with suppress(Exception):  # the connection may be gone, and the actors with it
                ray.kill(actor)


def _why_not(error: Exception) -> str:
    missing = re.search(r"No module named '([\w.]+)'", str(error))
    what = f"{missing[1]} is not installed there" if missing else " ".join(str(error).split())[:300]
    return f"a Ray worker could not start: {what}; every machine needs the same ptmoe, Ray and Python"


def _received(ray: Any, ref: Any, folder: ComparisonFolder, cell: Cell) -> int | str | None:
    """Write what a cell has made, whole or not at all; None where its process died."""
    from ptmoe.compare.workers import error_message
    from ptmoe.runs.folders import LOG_FILE

    try:
        outcome, files, printed = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # not of the cell: a full disk, no memory for its files
        return error_message(error.cause)
    except ray.exceptions.RayError:
        return None
    if printed:
        append(folder.path / LOG_FILE, printed.encode())
    place = folder.run_folder(cell)
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, data in files.items():
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_bytes(data)
    shutil.rmtree(place, ignore_errors=True)
    if files:
        part.rename(place)
    return int(outcome) if not isinstance(outcome, str) else outcome
