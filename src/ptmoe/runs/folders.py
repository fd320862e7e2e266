"""The layout of run and comparison folders (listed in `ptmoe.runs.records`), and a finished run as one value."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ptmoe.errors import PtmoeError
from ptmoe.files import CONTROL, check_name
from ptmoe.runs.records import Environment, EvaluationSummary, LogLine, NearestWords, Result
from ptmoe.settings import read_yaml
from ptmoe.tasks import is_file, task_named
from ptmoe.tasks.base import Task
from ptmoe.tasks.local import Keys

CONFIG_FILE, ENVIRONMENT_FILE, RESULT_FILE = "config.yaml", "environment.json", "result.json"
METRICS_FILE, ADAPTER_FOLDER, CHECKPOINTS_FOLDER = "metrics.jsonl", "adapter", "checkpoints"
INSPECT_FOLDER, NEAREST_FILE, ROUTING_FILE = "inspect", "nearest.json", "routing.json"
PLAN_FILE, CELL_FILE, FAILED_FILE, LOG_FILE = "comparison.yaml", "cell.json", "failed.jsonl", "log.txt"
TUNE_FILE, TRIALS_FILE, BEST_FILE = "tune.yaml", "trials.jsonl", "best.yaml"
SEARCH_FILE, SEARCH_FOLDER, CELLS_FOLDER = "search.jsonl", "search", "cells"
LOCK_FILE = ".lock"
ENDING = re.compile(r"(?<=.)\.jsonl(\.gz)?$")  # of a file of data
LONGEST_STEM = 200  # bytes of a name that is given endings


@contextmanager
def writing(folder: Path, busy: str = "another command is writing to") -> Iterator[None]:
    """Keep other commands from writing to a folder, which is created where it is missing, until this one ends, however
    it ends. A folder in which nothing was written is not left behind. Where another command holds it, `busy` is said,
    before the folder's name.

    Raises:
        PtmoeError: another command is writing to it, or it cannot have this name.
    """
    check_name(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK_FILE, blocking=False):
            yield
    except Timeout:
        raise PtmoeError(f"{busy} {folder}: wait for it, or stop it") from None
    finally:
        if made and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # the first that holds something else
                for path in made:
                    path.rmdir()


def file_name(name: str, split: str = "test") -> str:
    """The name of a task's files or a label's folder; a task that is a file goes by that file's name. What no file can
    be called is cut and changed, and told apart by a hash."""
    stem = ENDING.sub("", Path(name).name) if is_file(name) else name.replace("/", "__")
    fitting = CONTROL.sub("_", stem.encode(errors="replace")[:LONGEST_STEM].decode(errors="ignore"))
    if fitting != stem:
        fitting += f"-{sha256(stem.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return fitting if split == "test" or is_file(name) else f"{fitting}.{split}"


def distinct_tasks(names: Iterable[str]) -> dict[str, Task]:
    """The task behind each name. Files that would share their results' files, such as `a/test.jsonl` and
    `b/test.jsonl`, are called by their folders, too: `a__test` and `b__test`.

    Raises:
        PtmoeError: one file is given twice.
    """
    names = list(names)
    tasks = {name: task_named(name) for name in names}
    for name in names:
        others = [other for other in names if other != name and file_name(other) == file_name(name)]
        if not others or not is_file(name):
            continue
        own, *paths = (Path(path).resolve().parts[:-1] for path in (name, *filter(is_file, others)))
        depth = next((n for n in range(1, len(own)) if own[-n:] not in [path[-n:] for path in paths]), None)
        if depth is None:
            raise PtmoeError(f"{name} is given twice: name it once")
        tasks[name] = replace(tasks[name], name="__".join([*own[-depth:], file_name(name)]))
    return tasks


def evaluation_file(folder: Path, task: str, split: str = "test") -> Path:
    return folder / "eval" / f"{file_name(task, split)}.json"


def predictions_file(folder: Path, task: str, split: str = "test") -> Path:
    return folder / "predictions" / f"{file_name(task, split)}.jsonl"


def cell_folder(label: str, task: str, seed: int) -> Path:
    """A cell's run folder within its comparison."""
    return Path(CELLS_FOLDER, file_name(label), file_name(task), f"seed-{seed}")


def finished_cells(folder: Path, task: str) -> list[Path]:
    """The run folders in a comparison's of the finished cells that were trained on a task."""
    return sorted(path.parent for path in folder.glob(f"{CELLS_FOLDER}/*/{escape(file_name(task))}/*/{CELL_FILE}"))


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path  # where it was read from
    config: dict[str, Any]  # the options; `method` is a mapping with a `name`
    result: Result  # what was trained, and what that took
    environment: Environment  # what it ran on
    logs: tuple[LogLine, ...] = ()  # of its training, in order; empty where nothing was trained
    # By task; one on another split than `test` as `TASK, SPLIT`.
    evaluations: Mapping[str, EvaluationSummary] = field(default_factory=dict)
    predictions: Mapping[str, Path] = field(default_factory=dict)  # their files, by the same names, there or not
    nearest: NearestWords | None = None  # to the virtual tokens, where `ptmoe inspect` looked for them


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run whose training is finished."""
    return all((folder / name).is_file() for name in (RESULT_FILE, CONFIG_FILE, ENVIRONMENT_FILE))


def trained_with_chat(folder: Path) -> bool | None:
    """Whether a run was trained with its base's chat template; None for a folder that does not say."""
    chat = read_yaml(folder / CONFIG_FILE).get("chat") if (folder / CONFIG_FILE).is_file() else None
    return chat if isinstance(chat, bool) else None


def trained_with_keys(folder: Path) -> Keys | None:
    """The keys of the lines that a run was trained on, where they were mapped: of lines to evaluate it on that have
    them, too."""
    config = read_yaml(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    names = [name for key in ("prompt_key", "completion_key", "separator") if isinstance(name := config.get(key), str)]
    return Keys(names[0], names[1], names[2], where_there=True) if len(names) == 3 else None


def read_run(folder: str | Path) -> Run:
    """Read a run folder; no torch is needed for it.

    Raises:
        PtmoeError: a file is missing, damaged or lacks a key; the message names it and what is wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PtmoeError(f"{folder} is not a folder: give a run folder")
    for name in (RESULT_FILE, CONFIG_FILE, ENVIRONMENT_FILE):
        if not (folder / name).is_file():
            raise PtmoeError(f"{folder / name} is missing: {folder} is not the folder of a finished run")
    config = read_yaml(folder / CONFIG_FILE)
    if not isinstance(config.get("method"), dict) or "name" not in config["method"]:
        raise PtmoeError(f"{folder / CONFIG_FILE}: method.name is missing")
    evaluations: dict[str, EvaluationSummary] = {}
    predictions: dict[str, Path] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        summary = EvaluationSummary.read(path)
        name = summary.task if summary.split == "test" else f"{summary.task}, {summary.split}"
        evaluations[name] = summary
        predictions[name] = folder / "predictions" / f"{path.stem}.jsonl"
    nearest = folder / INSPECT_FOLDER / NEAREST_FILE
    return Run(
        folder=folder,
        config=config,
        result=Result.read(folder / RESULT_FILE),
        environment=Environment.read(folder / ENVIRONMENT_FILE),
        logs=tuple(LogLine.read_lines(folder / METRICS_FILE)),
        evaluations=evaluations,
        predictions=predictions,
        nearest=NearestWords.read(nearest) if nearest.is_file() else None,
    )
