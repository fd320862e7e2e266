"""Ray: one of its own on this machine, or a cluster by its address, connected for a while; and what it has room for."""

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
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError

LOCAL, NEAREST = "ray", "ray://auto"
CONNECT_SECONDS = 10.0  # for a machine to take a connection; Ray has a minute for the rest
# Nothing is sent to Ray's makers; neither advice nor what is said of each process that died is printed.
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
# Ray on this machine alone listens on the loopback interface alone, in spite of the variable's name; and its daemons
# measure less, of what nobody reads, on the cores on which cells run.
ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_metrics_report_interval_ms": "600000",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "5000",
}
OF_WORKERS = ("TMPDIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAY_AUTH_TOKEN")
TOKEN = secrets.token_hex(32)  # of this process's own Ray, so that other users of this machine cannot use it


@dataclass(frozen=True)
class Room:
    """What a session has room for."""

    ray: Any  # the module, connected
    jobs: int  # cells at once
    gpus: float  # for each; a fraction shares one


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
    variables = SILENT | (ALONE if on == LOCAL else {})
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
            with signals_kept():
                _connect(ray, on, options)
            yield room(ray, on, usual, jobs, gpus)
        finally:
            with signals_kept():
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
def signals_kept() -> Iterator[None]:
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
