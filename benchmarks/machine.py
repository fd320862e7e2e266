"""What one process measures of itself, on its CPU or its GPU, and what the benchmarks ran on."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.shapes import SHAPES
from ptmoe.runs.environment import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent
MEASURED = ["src", "benchmarks", ":!benchmarks/results", ":!benchmarks/RESULTS.md"]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Setting:
    """What a system is measured on; `held` is the memory in use once the base is there."""

    shape: str
    dtype: str
    held: int = 0

    @property
    def vocabulary(self) -> int:
        return SHAPES[self.shape].vocabulary

    def base(self) -> PreTrainedModel:
        model = SHAPES[self.shape].build(self.dtype, device())
        self.held = memory()
        return model


def memory() -> int:
    """Bytes that this process holds now: resident on a CPU, allocated on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    started = now()
    work()
    return now() - started


def describe() -> dict[str, Any]:
    """Hardware, versions, and the commit, which says where the measured code has changed since."""
    found = environment(seed=0).model_dump()
    commit = found["commit"] or "unknown"
    changed = subprocess.run(
        ["git", "status", "--porcelain", *MEASURED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        found["versions"]["trl"] = version("trl")
    except PackageNotFoundError:
        found["versions"]["trl"] = None
    return {
        "device": device(),
        "hardware": found["hardware"] | {"memory_bytes": _all_memory()},
        "versions": found["versions"],
        "commit": commit[:10] + (" with changes" if changed.stdout.strip() else ""),
    }


def _all_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    with open("/proc/meminfo") as lines:
        return int(next(lines).split()[1]) * 1024


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
