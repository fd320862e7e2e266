"""`--launch N`: a command in several processes on this machine, started by torch's own launcher."""

import logging
import os
import sys
import uuid
from typing import Annotated, Any, NoReturn

import typer

from ptmoe.errors import PtmoeError

OPTION = "--launch"
Launch = Annotated[
    int | None,
    typer.Option(OPTION, min=1, help="in this many processes on this machine, each with an accelerator or some cores"),
]


def run_in_processes(count: int, *more: str) -> NoReturn:
    """Run this command line without `--launch`, and with more arguments, in `count` processes, and exit with their
    status. SIGINT and SIGTERM are passed on, and where one process ends in an error the others are stopped.

    Raises:
        PtmoeError: a launcher has started this process already, or there are too few accelerators.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from ptmoe.runs.environment import world_size

    if world_size() > 1:
        raise PtmoeError(f"{OPTION} {count}: a launcher has started {world_size()} processes already: leave one out")
    if torch.accelerator.is_available() and torch.accelerator.device_count() < count:
        raise PtmoeError(f"{OPTION} {count}: this machine has {torch.accelerator.device_count()} accelerators")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what went wrong
    local: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": uuid.uuid4().hex}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=count, max_restarts=0, **local)
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "ptmoe", *without_launch(sys.argv[1:]), *more)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        raise typer.Exit(status if status > 0 else 128 - status) from None
    except SignalException as error:
        raise typer.Exit(128 + error.sigval) from None
    raise typer.Exit


def without_launch(arguments: list[str]) -> list[str]:
    """A command line without `--launch N`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != OPTION and not argument.startswith(f"{OPTION}="):
            kept.append(argument)
        skip = not skip and argument == OPTION
    return kept
