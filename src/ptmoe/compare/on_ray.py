"""Ray: one of its own on this machine, or a cluster by its address; and cells in its actors.

An actor takes one cell after the other. It trains in a folder of its own machine and sends all files back, which the
comparison alone writes: no shared folder is needed, and an actor that is thought dead and is not can write nothing. A
cell whose actor dies is run again, on any machine that has room.

What a worker imports to find its class is little: threads are set before torch is there.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe import __version__
from ptmoe.errors import PtmoeError
from ptmoe.files import append, naming

if TYPE_CHECKING:
    from ptmoe.compare.cells import Cell
    from ptmoe.compare.folder import ComparisonFolder
    from ptmoe.compare.watcher import Outcomes, Watcher

LOCAL, NEAREST = "ray", "ray://auto"
RETRIES = 3  # of a cell whose process or machine dies
CONNECT_SECONDS = 10.0  # for a machine to take a connection; Ray has a minute for the rest
NEWS_SECONDS = 0.5  # between two reports of an actor
QUIET_SECONDS = 60.0  # until it is said that Ray has no room
# Nothing is sent to Ray's makers; neither advice nor what is said of each process that died is printed.
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
# Ray on this machine alone listens on the loopback interface alone, in spite of the variable's name.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

OF_WORKERS = ("TMPDIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_AUTH_TOKEN")
TOKEN = secrets.token_hex(32)  # of this process's own Ray, so that other users of this machine cannot use it


@dataclass(frozen=True)
class Room:
    """What a session has room for.

    Attributes:
        ray: the module, connected.
        jobs: cells at once.
        gpus: for each; a fraction shares one.
    """

    ray: Any
    jobs: int
    gpus: float


def check_place(on: str) -> str:
    """
    Raises:
        PtmoeError: it names no place where cells run, or Ray is not installed.
    """
    if on == "processes":
        return on
    if on != LOCAL and not re.fullmatch(r"ray://(auto|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5})", on):
        raise PtmoeError(
            f"on {on!r}: needs processes, ray, ray://auto for the cluster that this machine belongs to, or "
            "ray://HOST:PORT for one by its client server, whose port is 10001 by default"
        )
    if importlib.util.find_spec("ray") is None:
        raise PtmoeError(f"--on {on} needs Ray, which is not installed: pip install 'ptmoe[ray]', or leave it out")
    return on


@contextmanager
def session(on: str, usual: int, jobs: int | None, gpus: float | None) -> Iterator[Room]:
    """Ray, connected for the time of the block; a connection that this process has already is used and left open.

    Args:
        on: `ray`, `ray://auto` or `ray://HOST:PORT`.
        usual: cells at once on this machine without a GPU.
        jobs: cells at once; by default as many as there is room for.
        gpus: for each cell; by default 1 where there are any, or each cell's share of them where `jobs` says how many.

    Raises:
        PtmoeError: Ray is not installed, the address does not answer, or no machine has room for a cell.
    """
    check_place(on)
    variables = SILENT | (LOOPBACK if on == LOCAL else {})
    if on != LOCAL and ("RAY_AUTH_TOKEN" in os.environ or Path("~/.ray/auth_token").expanduser().exists()):
        variables["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE", "token")  # what `ray start` has by default
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", *variables, *OF_WORKERS)}
    local = None
    try:
        os.environ.update(variables)  # read when Ray is imported
        import ray

        if ray.is_initialized():
            yield room(ray, on, usual, jobs, gpus)
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if on == LOCAL:
            local = tempfile.mkdtemp(prefix="ptmoe-ray-")
            threads = str(max(1, (os.cpu_count() or 1) // usual))
            os.environ.update(zip(OF_WORKERS, (local, threads, threads, TOKEN), strict=True))
            options |= {"include_dashboard": False, "num_cpus": max(usual, os.cpu_count() or 1), "_temp_dir": local}
        try:
            with _signals_kept():
                _connect(ray, on, options)
            yield room(ray, on, usual, jobs, gpus)
        finally:
            with _signals_kept():
                ray.shutdown()
    finally:
        if local is not None:
            shutil.rmtree(local, ignore_errors=True)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _connect(ray: Any, on: str, options: dict[str, Any]) -> None:
    """
    Raises:
        PtmoeError: nothing answers, or what answers is not Ray, or another Ray.
    """
    address = {LOCAL: "local", NEAREST: "auto"}.get(on, on)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address == on:
            host, _, port = on.removeprefix("ray://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        with redirect_stderr(io.StringIO()):  # what Ray says on its way to an error is in the error
            ray.init(address=address, **options)
    except Exception as error:  # Ray has many, of its own and of its transport
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = {
            LOCAL: "Ray could not be started on this machine",
            NEAREST: "this machine belongs to no Ray cluster that answers: start one with `ray start --head`, or leave "
            "the address out (--on ray) for one of its own",
        }.get(on, f"no Ray cluster answers at {on}: give the address of its client server, whose port is 10001 by "
                  "default, and use the cluster's versions of Ray and Python")  # fmt: skip
        raise PtmoeError(f"{remedy} ({reason})") from None


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray answers SIGTERM in its own way from when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def room(ray: Any, on: str, usual: int, jobs: int | None, gpus: float | None) -> Room:
    """What all machines together have room for.

    Raises:
        PtmoeError: none has room for a cell.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((machine.get("GPU", 0) for machine in machines), default=0)
    if gpus is None:
        every = sum(machine.get("GPU", 0) for machine in machines)
        gpus = min(1.0, every / jobs) if jobs else float(every > 0)
    if gpus > most:
        raise PtmoeError(
            f"a cell needs {gpus:g} GPUs, and no machine of {on} has more than {most:g}: lower --gpus-per-cell"
        )
    places = 0
    for machine in machines:
        places += int(machine.get("CPU", 0)) if not gpus else 0
        places += int(machine.get("GPU", 0)) * int(1 / gpus + 1e-9) if 0 < gpus <= 1 else 0
        places += int(machine.get("GPU", 0) // gpus) if gpus > 1 else 0
    if not places:
        raise PtmoeError(f"no machine of {on} has a CPU for a cell: start Ray with --num-cpus 1 or more")
    asked = jobs or (usual if on == LOCAL and not gpus else places)
    return Room(ray, min(asked, places), gpus)


class CellActor:
    """Runs one cell after the other; the second of its threads answers `news`."""

    def __init__(self, name: str, folder: str) -> None:
        self.folder = Path(tempfile.gettempdir(), f"ptmoe-{name}")  # the process that takes over finds it
        self.reports: list[tuple[Any, ...]] = []
        self.steps: dict[int, tuple[Any, ...]] = {}
        self.lock, self.turn = threading.Lock(), threading.Lock()
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
        """Run a cell.

        Args:
            number: by which `news` names it.
            options: of the run, with no folder.
            place: its folder to be, which messages name.

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
        return outcome, files, printed.getvalue()

    def _report(self, kind: str, number: int, *what: Any) -> None:
        with self.lock:
            if kind == "step":
                self.steps[number] = (kind, number, *what)  # the last is enough
            else:
                self.reports.append((kind, number, *what))

    def news(self) -> list[tuple[Any, ...]]:
        """What has happened since the last call."""
        time.sleep(NEWS_SECONDS)
        with self.lock:
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
                        time.sleep(NEWS_SECONDS)
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
        for ref in ray.wait([*asked], num_returns=len(asked), timeout=4 * NEWS_SECONDS)[0] if asked else ():
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
