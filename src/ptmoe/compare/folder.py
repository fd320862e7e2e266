"""A comparison's folder (`ptmoe.runs.records` has its layout): what is finished, what failed, and a lock on it."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptmoe.compare.cells import Cell
from ptmoe.compare.plan import ComparePlan, read_plan
from ptmoe.errors import PtmoeError
from ptmoe.files import check_name
from ptmoe.runs.folders import (
    CELL_FILE,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    FAILED_FILE,
    PLAN_FILE,
    SEARCH_FILE,
    finished_cells,
    writing,
)
from ptmoe.runs.records import CellRecord, Environment, Failure, write_lines
from ptmoe.runs.searches import RateSearch
from ptmoe.settings import differences, read_yaml
from ptmoe.train.examples import fingerprints
from ptmoe.train.options import PLACES


@dataclass(frozen=True)
class ComparisonFolder:
    path: Path

    def plan(self) -> ComparePlan | None:
        """What has been compared here; None where nothing has.

        Raises:
            PtmoeError: the folder is a file, holds something else or cannot have this name.
        """
        check_name(self.path)
        if (self.path / PLAN_FILE).is_file():
            return read_plan(self.path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise PtmoeError(f"{self.path} holds something other than a comparison: choose another --output-dir")
        return None

    def written(self) -> str | None:
        """The text of the plan's file; None where there is none."""
        path = self.path / PLAN_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def held(self) -> AbstractContextManager[None]:
        """Create the folder, and keep other commands out of it until this one ends, however it ends.

        Raises:
            PtmoeError: another command is using it.
        """
        return writing(self.path, "another ptmoe compare is running in")

    def run_folder(self, cell: Cell) -> Path:
        return self.path / cell.place

    def is_finished(self, cell: Cell) -> bool:
        """Whether the cell was run to its end, as it is planned now."""
        try:
            record = CellRecord.read(self.run_folder(cell) / CELL_FILE)
        except PtmoeError:
            return False
        return record == cell.record(record.trainable_parameters)

    def check_data(self, cell: Cell, say: Callable[[str], None]) -> None:
        """Read all data that a cell needs, where finished ones were trained on the same task.

        Raises:
            PtmoeError: one of them was trained or evaluated on other examples.
        """
        made = {}
        for folder in finished_cells(self.path, cell.task):
            with suppress(PtmoeError):  # the report says that it is damaged
                made[folder] = Environment.read(folder / ENVIRONMENT_FILE)
        if unknown := [folder for folder, each in made.items() if not (each.trained_on or each.evaluated_on)]:
            say(f"{unknown[0]} records no fingerprint of its examples: whether they are those of now is not known")
        if len(unknown) == len(made):
            return
        trained_on, evaluated_on = fingerprints(cell.options, say)
        for folder, each in made.items():
            different = [f"trained on other examples of {cell.task}"] * (each.trained_on not in (None, trained_on))
            for name, found in each.evaluated_on.items():
                if evaluated_on.get(name, found) != found:
                    different.append(f"evaluated on other examples of {name}")
            if different:
                raise PtmoeError(
                    f"{folder} was {' and '.join(different)} than there are now: put the data back, or choose another "
                    "--output-dir"
                )

    def differences(self, cell: Cell) -> list[str]:
        """In what a finished cell was trained otherwise than is planned now: the plan's file was edited. What the plan
        leaves at None the run has decided, the names of a base's layers are in its own order, and data may have been
        moved."""
        try:
            trained = read_yaml(self.run_folder(cell) / CONFIG_FILE)
        except PtmoeError:  # the report says that it is damaged
            return []
        planned, ignored = cell.options.model_dump(mode="json"), {"method"} | PLACES
        for options in (trained, planned):  # whether there are checkpoints decides nothing
            if isinstance(trainer := options.get("trainer"), dict):
                options["trainer"] = {name: value for name, value in trainer.items() if name != "save_strategy"}
        pairs = [(name, trained[name], value) for name, value in planned.items() if name in trained.keys() - ignored]
        own = trained.get("method")
        pairs += [(name, own[name], value) for name, value in planned["method"].items() if own and name in own]
        decided = (pair for pair in pairs if pair[2] is not None and _unordered(pair[1]) != _unordered(pair[2]))
        return differences(decided)

    def finish(self, cell: Cell, outcome: int | str) -> None:
        """Record the number of trainable parameters of a cell, which is then never run again, or why it failed."""
        failures = [failure for failure in self.failures() if failure.cell != cell.key]
        if isinstance(outcome, int):
            cell.record(outcome).write(self.run_folder(cell) / CELL_FILE)
        else:
            failures.append(Failure(label=cell.variant.label, task=cell.task, seed=cell.seed, error=outcome))
        path = self.path / FAILED_FILE
        if failures:
            write_lines(path, failures)
        else:
            path.unlink(missing_ok=True)

    def failures(self) -> list[Failure]:
        """The cells that failed when they were last run."""
        return Failure.read_lines(self.path / FAILED_FILE)

    def searches(self) -> list[RateSearch]:
        """The searches for learning rates, finished or not."""
        return RateSearch.read_lines(self.path / SEARCH_FILE)

    def write_searches(self, searches: Iterable[RateSearch]) -> None:
        write_lines(self.path / SEARCH_FILE, searches)


def _unordered(value: Any) -> Any:
    return set(map(str, value)) if isinstance(value, list) else value
