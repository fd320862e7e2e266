"""Where the time of one system goes, operator by operator.

python -m benchmarks.profiling step "ptmoe pt-moe" --name passages --shape llama-1b --dtype bfloat16
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import PARTS, QUICK_SHAPE, cases
from benchmarks.machine import device
from benchmarks.report import table
from benchmarks.shapes import SHAPES
from benchmarks.worker import built
from ptmoe.models.bases import quiet

ROWS = 12


def profiled(request: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Each operator's name, its own seconds and its calls in one round, the longest first; a round before it warms up.

    Args:
        request: as the worker reads it.
    """
    _, measure = built(request)
    measure(False)
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        measure(False)
    found = [
        (event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6, event.count)
        for event in profiler.key_averages()
    ]
    return sorted(found, key=lambda one: -one[1])


def operators(found: list[tuple[str, float, int]]) -> list[str]:
    """Markdown: the first of them, and the sum of all."""
    total = sum(seconds for _, seconds, _ in found)
    rows = [[f"`{name}`", f"{s:.3g}", f"{s / total:.1%}", f"{calls:,}"] for name, s, calls in found[:ROWS]]
    return table(["operator", "seconds", "share", "calls"], [*rows, ["all", f"{total:.3g}", "", ""]])


UNFIT = ("adapters", "linear", "head", "attention", "startup", "study")  # no base, or other processes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("part", choices=[part for part in PARTS if part not in UNFIT])
    parser.add_argument("system", help="as in RESULTS.md")
    parser.add_argument("--name", help="of the case within its part; by default the first")
    parser.add_argument("--shape", choices=SHAPES, default="sketch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args()
    quick = chosen.shape == QUICK_SHAPE
    made = {case.name: case for case in cases([chosen.part], [chosen.shape], [chosen.dtype], device(), quick=quick)}
    name = chosen.name or next(iter(made))
    if name not in made:
        parser.error(f"no case {name!r} in {chosen.part}: it has {'; '.join(made)}")
    systems = made[name].systems
    if chosen.system not in systems:
        parser.error(f"no system {chosen.system!r} in {name}: it has {', '.join(systems)}")
    quiet()
    request = {"shape": chosen.shape, "dtype": chosen.dtype, **systems[chosen.system]}
    print(*operators(profiled(request)), sep="\n")


if __name__ == "__main__":
    main()
