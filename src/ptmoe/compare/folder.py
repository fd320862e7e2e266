"""A comparison's folder: what of it is finished, what failed, and whose it is while it is worked on.

COMPARISON/comparison.yaml  failed.jsonl  log.txt  cells/LABEL/TASK/seed-N/{a run folder, cell.json}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptmoe.compare.cells import Cell
from ptmoe.compare.plan import PLAN_FILE, ComparePlan, read_plan
from ptmoe.errors import PtmoeError
from ptmoe.files import write_whole

try:
    import fcntl
except ImportError:  # Windows: two commands on one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]

CELL_FILE, FAILED_FILE, LOG_FILE = "cell.json", "failed.jsonl", "log.txt"


@dataclass(frozen=True)
class ComparisonFolder:
    path: Path

    def plan(self) -> ComparePlan | None:
        """What has been compared here; None where nothing has.

        Raises:
            PtmoeError: the folder is a file or holds something else.
        """
        if (self.path / PLAN_FILE).is_file():
            return read_plan(self.path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise PtmoeError(f"{self.path} holds something that is no comparison: choose another --output-dir")
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other commands out of it until this one ends, however it ends.

        Raises:
            PtmoeError: another one is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise PtmoeError(f"another ptmoe compare is at work in {self.path}: wait for it, or stop it") from None
        finally:
            os.close(handle)

    def run_folder(self, cell: Cell) -> Path:
        return self.path / cell.place

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell was run to its end, as it is planned now."""
        try:
            written = json.loads((self.run_folder(cell) / CELL_FILE).read_text())
        except (OSError, ValueError):
            return False
        return isinstance(written, dict) and all(written.get(key) == value for key, value in cell.record().items())

    def start(self, cell: Cell) -> None:
        """Clear away what a broken-off run has left."""
        shutil.rmtree(self.run_folder(cell), ignore_errors=True)

    def finish(self, cell: Cell, trainable_parameters: int) -> None:
        """The last thing written: from now on the cell is never run again."""
        record = {**cell.record(), "trainable_parameters": trainable_parameters}
        write_whole(self.run_folder(cell) / CELL_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        self._write_failures(self._failures_but(cell))

    def fail(self, cell: Cell, error: str) -> None:
        line = {"label": cell.variant.label, "task": cell.task, "seed": cell.seed, "error": error}
        self._write_failures([*self._failures_but(cell), line])

    def failures(self) -> list[dict[str, Any]]:
        """The cells that failed when they were last run."""
        path = self.path / FAILED_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _failures_but(self, cell: Cell) -> list[dict[str, Any]]:
        own = {"label": cell.variant.label, "task": cell.task, "seed": cell.seed}
        return [one for one in self.failures() if any(one[key] != value for key, value in own.items())]

    def _write_failures(self, lines: list[dict[str, Any]]) -> None:
        path = self.path / FAILED_FILE
        if lines:
            write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        else:
            path.unlink(missing_ok=True)
