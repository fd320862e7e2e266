"""A comparison's folder (`ptmoe.runs.records` has its layout): what is finished, what failed, and a lock on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ptmoe.compare.cells import Cell
from ptmoe.compare.plan import ComparePlan, read_plan
from ptmoe.errors import PtmoeError
from ptmoe.runs.folders import CELL_FILE, FAILED_FILE, PLAN_FILE
from ptmoe.runs.records import CellRecord, Failure, write_lines

try:
    import fcntl
except ImportError:  # Windows: two commands on one folder are then not kept apart
    fcntl = None  # type: ignore[assignment]


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
            raise PtmoeError(f"{self.path} holds something other than a comparison: choose another --output-dir")
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other commands out of it until this one ends, however it ends.

        Raises:
            PtmoeError: another command is using it.
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
            raise PtmoeError(f"another ptmoe compare is running in {self.path}: wait for it, or stop it") from None
        finally:
            os.close(handle)

    def run_folder(self, cell: Cell) -> Path:
        return self.path / cell.place

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell was run to its end, as it is planned now."""
        try:
            record = CellRecord.read(self.run_folder(cell) / CELL_FILE)
        except PtmoeError:
            return False
        return record.model_dump(exclude={"trainable_parameters"}) == cell.record()

    def start(self, cell: Cell) -> None:
        """Remove what an interrupted run has left."""
        shutil.rmtree(self.run_folder(cell), ignore_errors=True)

    def finish(self, cell: Cell, trainable_parameters: int) -> None:
        """The last thing written: from now on the cell is never run again."""
        record = CellRecord(**cell.record(), trainable_parameters=trainable_parameters)
        record.write(self.run_folder(cell) / CELL_FILE)
        self._write_failures(self._other_failures(cell))

    def fail(self, cell: Cell, error: str) -> None:
        failure = Failure(label=cell.variant.label, task=cell.task, seed=cell.seed, error=error)
        self._write_failures([*self._other_failures(cell), failure])

    def failures(self) -> list[Failure]:
        """The cells that failed when they were last run."""
        path = self.path / FAILED_FILE
        return Failure.read_lines(path) if path.exists() else []

    def _other_failures(self, cell: Cell) -> list[Failure]:
        own = (cell.variant.label, cell.task, cell.seed)
        return [failure for failure in self.failures() if failure.cell != own]

    def _write_failures(self, failures: list[Failure]) -> None:
        path = self.path / FAILED_FILE
        if failures:
            write_lines(path, failures)
        else:
            path.unlink(missing_ok=True)
