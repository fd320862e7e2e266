"""How long a command takes from its start to its end, in a new interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

from benchmarks.machine import Setting, seconds
from benchmarks.worker import Round


def command(_: Setting, arguments: list[str], repeats: int) -> Round:
    """The median of some runs of `python ARGUMENTS`; the warm-up has brought the files into memory."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    def measure(_: bool) -> dict[str, Any]:
        return {"seconds": statistics.median(seconds(run) for _ in range(repeats))}

    return measure
