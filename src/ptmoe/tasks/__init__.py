"""The tasks: read, prompt, score. Each family of data sets has its own file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks import asdiv, gsm8k, local, math_problems, mawps, mixture, mrqa, nano, sources, svamp
from ptmoe.tasks.base import Example, Origin, Task, unique
from ptmoe.tasks.records import BadRecordError, Format, Problems, Record, head

FAMILIES = (nano, mrqa, gsm8k, svamp, asdiv, mawps, math_problems)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}
GROUPS: dict[str, tuple[str, ...]] = {**mrqa.GROUPS, "math-out": ("svamp", "asdiv", "mawps", "math_problems")}

__all__ = [
    "GROUPS",
    "TASKS",
    "Example",
    "Problems",
    "Task",
    "is_file",
    "load_task",
    "score",
    "stream_task",
    "task_named",
    "task_names",
]


def task_names(name: str) -> list[str]:
    """The names of the tasks behind a name: of one task, of a group, or of a list with commas.

    Raises:
        PtmoeError: an unknown task.
    """
    return [name] if is_file(name) else [part.task for part in mixture.parse(name, TASKS, GROUPS)]


def is_file(name: str) -> bool:
    """Whether a task's name is a JSON-lines file, or a folder of them."""
    return name not in TASKS and name not in GROUPS and (name.endswith((".jsonl", ".jsonl.gz")) or Path(name).exists())


def task_named(name: str) -> Task:
    """A named task, or the task that grades a JSON-lines file."""
    return local.task(name) if is_file(name) else TASKS[task_names(name)[0]]


def load_task(
    name: str,
    split: str = "test",
    data_dir: str | Path | None = None,
    *,
    ids: str | Path | None = None,
    max_examples: int | None = None,
    problems: Problems | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Example]:
    """The examples of a task.

    Args:
        name: a key of `TASKS` or `GROUPS`, a mixture (`"gsm8k=2,mawps=1"`), or a JSON-lines file (`ptmoe.tasks.local`
            says what its lines hold).
        split: of a named task.
        data_dir: where the data set is: a folder, or a file in the data set's own format. By default it is downloaded
            once and cached (`ptmoe.tasks.sources`); nano's world is generated.
        ids: a file of example ids, one a line or a JSON list: only these.
        max_examples: the first N only.
        problems: `Problems(skip=True)` counts and lists bad records instead of refusing them.
        say: called with a line for each download.

    Raises:
        PtmoeError: an unknown task or split, missing or bad data, ids that repeat, or no example at all.
    """
    problems = problems if problems is not None else Problems()
    stream = _examples(name, split, data_dir, problems, say)
    examples = unique(islice(stream, None if ids else max_examples), problems)
    problems.refuse()
    if not examples:
        bad = f"; {problems.listed()}" if problems.count else ""
        raise PtmoeError(f"{name} ({data_dir or split}) holds no example: needs at least one{bad}")
    if ids is not None:
        wanted = _ids(Path(ids))
        if unknown := sorted(wanted - examples.keys()):
            raise PtmoeError(f"{ids} names {len(unknown)} id(s) that {name} lacks: {', '.join(unknown[:3])}")
        examples = {name: example for name, example in examples.items() if name in wanted}
    return list(examples.values())[:max_examples]


def stream_task(
    name: str,
    split: str = "test",
    data_dir: str | Path | None = None,
    *,
    problems: Problems | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Example]:
    """The same examples as a stream, in constant memory: repeated ids go unnoticed, and the first bad record raises
    unless `problems` skips them."""
    for _, example in _examples(name, split, data_dir, problems or Problems(at_once=True), say):
        yield example


def _examples(
    name: str, split: str, data_dir: str | Path | None, problems: Problems, say: Callable[[str], None]
) -> Iterator[tuple[str, Example]]:
    """Each example with its location, `FILE:LINE`."""
    if is_file(name):
        yield from local.read(Path(name), problems)
        return
    parts = mixture.parse(name, TASKS, GROUPS)
    if len(parts) == 1:
        yield from _of_task(TASKS[parts[0].task], split, data_dir, problems, say)
        return
    if data_dir is not None and Path(data_dir).is_file():
        raise PtmoeError(f"{name} is several tasks, {data_dir} one file: give the folder that holds them all")
    streams = [(example for _, example in _of_task(TASKS[part.task], split, data_dir, problems, say)) for part in parts]
    for example in mixture.mixed(parts, streams):
        yield example.id, example


def _of_task(
    task: Task, split: str, data_dir: str | Path | None, problems: Problems, say: Callable[[str], None]
) -> Iterator[tuple[str, Example]]:
    if split not in task.splits:
        raise PtmoeError(f"task {task.name!r} has no split {split!r}{near(split, task.splits)}")
    if task.generate is not None:
        yield from ((example.id, example) for example in task.generate(task.name, split))
        return
    source = sources.locate(task, split, data_dir, say)
    if source.path is None:
        assert task.hub is not None
        yield from read(sources.hub_rows(source), task.hub.example, task.name, split, problems)
    else:
        chosen = format_of(source.path, task)
        yield from read(chosen.records(source.path, problems), chosen.example, task.name, split, problems)


def read(
    records: Iterable[Record],
    example: Callable[[dict[str, object], Origin], Example],
    task: str,
    split: str,
    problems: Problems,
) -> Iterator[tuple[str, Example]]:
    """Examples from records; bad records are added to `problems`."""
    for number, (place, record) in enumerate(records):
        try:
            yield place, example(record, Origin(task, split, number))
        except BadRecordError as problem:
            problems.add(place, str(problem))


def format_of(path: Path, task: Task) -> Format:
    """The format of the task that a file has.

    Raises:
        PtmoeError: it looks like another data set's file; the message says which.
    """
    found = head(path)
    for candidate in task.formats:
        if candidate.kind == found.kind and candidate.recognise(found.keys):
            return candidate
    needed = ", ".join(candidate.name for candidate in task.formats)
    for other in (*TASKS.values(), local.task("FILE")):
        for candidate in other.formats:
            if candidate.kind == found.kind and candidate.recognise(found.keys):
                raise PtmoeError(
                    f"{path} looks like {candidate.name}, and {task.name} needs {needed}: "
                    f"give it to --task {other.name}"
                )
    same_kind = [candidate for candidate in task.formats if candidate.kind == found.kind or not found.kind]
    if not same_kind:
        raise PtmoeError(f"{path} is in no format of {task.name}: needs {needed}")
    return same_kind[0]  # its first record is damaged or lacks a key; reading reports where


def _ids(path: Path) -> set[str]:
    """The ids in a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PtmoeError(f"{path} holds no ids ({error}): needs one a line, or a JSON list") from None
    ids = [text for item in listed if (text := str(item).strip())]
    if not ids:
        raise PtmoeError(f"{path} holds no id: needs at least one")
    counts = Counter(ids)
    if len(counts) < len(ids):
        repeated = sorted(name for name, count in counts.items() if count > 1)[:3]
        raise PtmoeError(f"{path} names {len(ids) - len(counts)} id(s) twice: {', '.join(repeated)}")
    return set(counts)


from ptmoe.tasks.scoring import score  # noqa: E402  it imports the tasks above
