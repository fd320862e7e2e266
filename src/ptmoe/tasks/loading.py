"""The tasks by name, and their examples."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks import local, mixture, mrqa, sources
from ptmoe.tasks.base import Example, Format, Origin, Task, collect, folded, is_held_out
from ptmoe.tasks.problems import Problems
from ptmoe.tasks.records import READERS, Record, head, whole_text

# The modules with the data sets, in the order in which these are listed. A new one is a file and its name in this line.
FAMILIES = "nano mrqa gsm8k svamp asdiv mawps math_problems classification".split()
TASKS: dict[str, Task] = {
    task.name: task for family in FAMILIES for task in import_module(f"ptmoe.tasks.{family}").TASKS
}
GROUPS: dict[str, tuple[str, ...]] = {**mrqa.GROUPS, "math-out": ("svamp", "asdiv", "mawps", "math_problems")}

Places = tuple[str | Path | None, str | Path | None]
"""Where the data is, and where that of a run's evaluation is, None for where it is found by itself."""


def task_names(name: str) -> list[str]:
    """The names of the tasks behind a name: of one task, of a group, or of a list with commas.

    Raises:
        PtmoeError: an unknown task.
    """
    return [name] if is_file(name) else list(mixture.parse(name, TASKS, GROUPS))


def listed_names(text: str) -> list[str]:
    """The tasks behind a list with commas, in which groups and files may stand, too; each is evaluated by itself.

    Raises:
        PtmoeError: an unknown task.
    """
    parts = [part.strip() for part in text.split(",")]
    if is_file(text) or not any(map(is_file, parts)):
        return task_names(text)
    return list(dict.fromkeys(name for part in parts for name in task_names(part)))


def is_file(name: str) -> bool:
    """Whether a task's name is a JSON-lines file, or a folder of them."""
    if name in TASKS or name in GROUPS:
        return False
    return ("," not in name and name.endswith(local.LINES)) or os.path.exists(name)


def task_named(name: str) -> Task:
    """A named task, or the task that grades a JSON-lines file."""
    return local.task(name) if is_file(name) else TASKS[task_names(name)[0]]


def check_size(name: str, max_examples: int | None) -> None:
    """
    Raises:
        PtmoeError: too few examples for one of each part of a mixture.
    """
    names = [] if is_file(name) else task_names(name)
    parts = sum(len(TASKS[task].parts) or 1 for task in names)
    if max_examples is not None and max_examples < parts:
        raise PtmoeError(
            f"{max_examples} examples of {name}, which mixes {parts} tasks: needs at least one of each, raise it to "
            f"{parts} or more"
        )


def check_data_dir(names: Iterable[str], data_dir: str | Path | None) -> None:
    """
    Raises:
        PtmoeError: several of the tasks would be read from one file.
    """
    read = [name for name in names if not is_file(name) and TASKS[name].generate is None]
    if len(read) > 1 and data_dir is not None and Path(data_dir).is_file():
        raise PtmoeError(f"{len(read)} tasks ({', '.join(read)}) and one file {data_dir}: give the folder of them all")


def check_labels(tasks: Iterable[Task]) -> None:
    """
    Raises:
        PtmoeError: a task without labels, whose answers cannot be scored by the labels' likelihoods.
    """
    parts = [part for task in tasks for part in (map(TASKS.__getitem__, task.parts) if task.parts else [task])]
    if lacking := [part.name for part in parts if not part.labels]:
        raise PtmoeError(
            f"--score choices compares the labels of a classification, which {', '.join(lacking)} lacks: evaluate it "
            "by the answers that the model writes (--score answers)"
        )


def load_task(
    name: str,
    split: str = "test",
    data_dir: str | Path | None = None,
    *,
    eval_data_dir: str | Path | None = None,
    ids: str | Path | None = None,
    max_examples: int | None = None,
    problems: Problems | None = None,
    keys: local.Keys | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Example]:
    """The examples of a task.

    Args:
        name: a key of `TASKS` or `GROUPS`, a mixture (`"gsm8k=2,mawps=1"`), or a JSON-lines file (`ptmoe.tasks.local`
            says what its lines hold).
        split: of a named task.
        data_dir: where the data set is: a folder, or a file in the data set's own format. By default it is downloaded
            once and cached (`ptmoe.tasks.sources`); nano's world is generated.
        eval_data_dir: where a run that trains on them finds what it is tested on, if elsewhere (`Task.disjoint`).
        ids: a file of example ids, one a line or a JSON list: only these.
        max_examples: the first N only.
        problems: `Problems(skip=True)` counts and lists bad records instead of refusing them.
        keys: of a JSON-lines file.
        say: called with a line for each download.

    Raises:
        PtmoeError: an unknown task or split, missing or bad data, ids that repeat, no example at all, or fewer than a
            mixture has parts.
    """
    check_size(name, max_examples)
    problems = problems if problems is not None else Problems()
    stream = _examples(name, split, (data_dir, eval_data_dir), problems, say, keys)
    examples = collect(islice(stream, None if ids else max_examples), problems, f"{name} ({data_dir or split})")
    if ids is None:
        return examples
    wanted = _ids(Path(ids))
    if unknown := sorted(wanted - {example.id for example in examples}):
        raise PtmoeError(f"{ids} names {len(unknown)} id(s) that {name} lacks: {', '.join(unknown[:3])}")
    return [example for example in examples if example.id in wanted][:max_examples]


def stream_task(
    name: str,
    split: str = "test",
    data_dir: str | Path | None = None,
    *,
    eval_data_dir: str | Path | None = None,
    problems: Problems | None = None,
    keys: local.Keys | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Example]:
    """The same examples as a stream, in constant memory: repeated ids go unnoticed, and the first bad record raises
    unless `problems` skips them."""
    for _, example in _examples(name, split, (data_dir, eval_data_dir), problems or Problems(at_once=True), say, keys):
        yield example


def _examples(
    name: str, split: str, places: Places, problems: Problems, say: Callable[[str], None], keys: local.Keys | None
) -> Iterator[tuple[str, Example]]:
    """Each example with its location, `FILE:LINE`."""
    if is_file(name):
        yield from local.read(Path(name), problems, keys)
        return
    yield from _mixed(name, mixture.parse(name, TASKS, GROUPS), split, places, problems, say)


def _mixed(
    name: str, weights: mixture.Weights, split: str, places: Places, problems: Problems, say: Callable[[str], None]
) -> Iterator[tuple[str, Example]]:
    tasks = [TASKS[task] for task in weights]
    later = _inputs_of_later_splits(tasks, split, places, say)
    streams = [_of_task(task, split, places, problems, say, later) for task in tasks]
    if len(streams) == 1:
        yield from streams[0]
        return
    check_data_dir(weights, places[0])
    yield from mixture.mixed(weights, streams)


def _of_task(
    task: Task, split: str, places: Places, problems: Problems, say: Callable[[str], None], later: set[str]
) -> Iterator[tuple[str, Example]]:
    if split not in task.splits:
        raise PtmoeError(f"task {task.name!r} has no split {split!r}{near(split, task.splits)}")
    if task.parts:
        yield from _mixed(task.name, dict.fromkeys(task.parts), split, places, problems, say)
        return
    if task.generate is not None:
        yield from ((example.id, example) for example in task.generate(task.name, split))
        return
    held_out, repeated = task.splits[split].held_out, 0
    for place, example in _of_source(task, split, places[0], problems, say):
        if task.disjoint and folded(example.input) in later:
            repeated += 1
        elif held_out is None or held_out == is_held_out(example.input):
            yield place, example
    if repeated:
        say(f"{task.name}, {split}: left out {repeated} problem(s) that stand in a later split, too")


def _inputs_of_later_splits(tasks: Iterable[Task], split: str, places: Places, say: Callable[[str], None]) -> set[str]:
    """The inputs that a split of `disjoint` tasks may not hold, folded. MAWPS and ASDiv-A share problems, so what one
    of two that are mixed is tested on may not be trained on with the other."""
    data_dir, eval_data_dir = places
    inputs: set[str] = set()
    for task in tasks:
        if not task.disjoint or split not in task.splits:
            continue
        splits = list(task.splits)
        for later in splits[splits.index(split) + 1 :]:
            # A single file is one split: of `data_dir` the one that is asked for, of `eval_data_dir` the tested one.
            known = [data_dir] if data_dir is None or not Path(data_dir).is_file() else []
            if eval_data_dir is not None and (later == "test" or not Path(eval_data_dir).is_file()):
                known.append(eval_data_dir)
            for place in known:
                with suppress(PtmoeError):  # a split that is not there
                    examples = _of_source(task, later, place, Problems(skip=True), say)
                    inputs |= {folded(example.input) for _, example in examples}
    return inputs


def _of_source(
    task: Task, split: str, data_dir: str | Path | None, problems: Problems, say: Callable[[str], None]
) -> Iterator[tuple[str, Example]]:
    """All examples of a split's file, or of its rows on the Hub."""
    path = sources.locate(task, split, data_dir, say)
    records: Iterable[Record]
    make: Callable[[dict[str, Any], Origin], Example]
    if path is not None:
        kind, form = _format(path, task)
        read, make = form.reader or READERS[kind or form.kinds[0]], form.example
        records = islice(read(path, problems), form.first)
    else:
        assert task.hub is not None
        records, make = sources.hub_rows(task, split), task.hub.example
    for number, (place, record) in enumerate(records):
        with problems.at(place):
            yield place, make(record, Origin(task.name, split, number)).read_at(place)


def _format(path: Path, task: Task) -> tuple[str, Format]:
    """A file's kind, and the format of the task that it has.

    Raises:
        PtmoeError: it looks like another data set's file; the message says which.
    """
    kind, keys = head(path)
    needed = ", ".join(form.name for form in task.formats)
    for other in (task, *TASKS.values(), local.task("FILE")):
        form = next((form for form in other.formats if form.recognises(kind, keys)), None)
        if form is not None and other is task:
            return kind, form
        if form is not None:
            raise PtmoeError(
                f"{path} looks like {form.name}, and {task.name} needs {needed}: give it to --task {other.name}"
            )
    for form in task.formats:
        if kind in form.kinds:  # its first record lacks a key, or `kind` is "": reading reports the damage
            return kind, form
    raise PtmoeError(f"{path} is in no format of {task.name}: needs {needed}")


def _ids(path: Path) -> set[str]:
    """The ids in a file."""
    try:
        text = whole_text(path)
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PtmoeError(f"{path} holds no ids ({error}): needs one a line, or a JSON list") from None
    counts = Counter(name for item in listed if (name := str(item).strip()))
    if not counts:
        raise PtmoeError(f"{path} holds no id: needs at least one")
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        twice = counts.total() - len(counts)
        raise PtmoeError(f"{path} names {twice} id(s) twice: {', '.join(repeated[:3])}")
    return set(counts)
