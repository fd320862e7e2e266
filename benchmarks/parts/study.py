"""A whole `ptmoe compare`, from its start to its end with its report, as its user waits for it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import Setting, seconds
from benchmarks.worker import Round


def compare(_: Setting, on: str, cells: int, steps: int) -> Round:
    """So many seeds of `pt` on nano's mixed world, as many at once as there are cores; Ray is started each time."""
    arguments = ["-m", "ptmoe", "compare", "--model", "nano", "--task", "nano/mixed", "--method", "pt"]
    arguments += ["--seeds", str(cells), "--max-steps", str(steps), "--eval-examples", "100", "--on", on]

    def measure(_: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *arguments, "--output-dir", str(Path(folder) / "study")]
            taken = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
            assert len(list(Path(folder).rglob("cell.json"))) == cells
        return {"seconds": taken}

    return measure
