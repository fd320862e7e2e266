"""Which of two ways to compute the same thing is faster on this machine: measured once, and kept.

The two round differently, so a resumed run has to find the same verdict: it is a file in the cache's folder.
"""

import hashlib
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ptmoe.files import cache_folder

TIMES = 5
WORTHWHILE = 0.95  # of the other way's time

Computation = Callable[..., Any]


def is_faster(
    name: str,
    ours: Computation,
    theirs: Computation,
    operands: Callable[[], Iterable[Any]],
    *,
    one_thread: bool = False,
) -> bool:
    """Whether `ours` was faster than `theirs` when this machine was first measured.

    Args:
        name: of the cache's folder where the verdict is kept, `$PTMOE_CACHE/{name}`.
        ours, theirs: called with the arguments that each of the operands holds.
        operands: made only where there is no verdict yet.
        one_thread: compare the processor time of one thread, which other programs on the machine hardly change; for
            two ways that are spread over threads alike.
    """
    threads = 1 if one_thread else torch.get_num_threads()
    key = f"{platform.machine()} {_processor()} {torch.__version__} {threads} threads"
    file = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        path = cache_folder(name, create=True) / file
        if not path.exists():
            part = path.with_name(f".{uuid.uuid4().hex}")
            clock = time.thread_time if one_thread else time.perf_counter
            with _threads(threads):
                ratio = time_ratio(ours, theirs, operands(), clock)
            part.write_text(f"{ratio:.3f}\n{key}\n")
            with suppress(FileExistsError):  # of two processes that measure at the same time, the first decides
                os.link(part, path)
            part.unlink()
        return float(path.read_text().split()[0]) <= WORTHWHILE
    except (OSError, ValueError, IndexError):  # a verdict that cannot be kept could differ in the next process
        return False


def time_ratio(
    ours: Computation, theirs: Computation, operands: Iterable[Any], clock: Callable[[], float] = time.perf_counter
) -> float:
    """The time of `ours` over that of `theirs`, for each operand the fastest of several in turns."""

    def seconds(computation: Computation, operand: Any) -> float:
        started = clock()
        computation(*operand)
        return clock() - started

    total = {ours: 0.0, theirs: 0.0}
    for operand in operands:
        turns = [{way: seconds(way, operand) for way in total} for _ in range(TIMES)]
        for way in total:
            total[way] += min(turn[way] for turn in turns)
    return total[ours] / total[theirs]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within it `torch` computes in so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
