"""The examples that a run trains and is evaluated on, as its options name them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe import nano
from ptmoe.errors import PtmoeError
from ptmoe.tasks import (
    TASKS,
    Example,
    Problems,
    check_data_dir,
    check_labels,
    check_size,
    is_file,
    listed_names,
    load_task,
    stream_task,
    task_named,
    task_names,
)
from ptmoe.tasks import local as local_task
from ptmoe.tasks.base import folded
from ptmoe.tasks.records import DAMAGED, opened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.train.options import SharedOptions, TrainOptions

MOST_TEXTS, NANO_TEXTS = 200, 110  # that show what a base forgets; of nano's skills ten each
FORGETTING = "forgetting"  # as the name of a task
LONGEST_LINE = 100_000  # characters; of a longer one the rest counts as another


def training_examples(options: TrainOptions, problems: Problems, say: Callable[[str], None]) -> Iterable[Example]:
    """All but those that the run is validated on. The first are read at once, so that missing data is reported before
    the base is loaded; a task's others as they are needed, so that no data set has to fit into memory as text."""
    stream = _stream(options, problems, say)
    if evaluation_split(options) == "train":
        stream = _others(*_parted(options, stream), say)
    return islice(stream, options.max_examples)


def _stream(options: TrainOptions, problems: Problems, say: Callable[[str], None]) -> Iterator[Example]:
    """The training split, or the file."""
    if options.task is None:
        assert options.data is not None
        return iter(local_task.load(options.data, replace(options.keys, where_there=False), problems))
    check_size(options.task, options.max_examples)
    how: dict[str, Any] = {"eval_data_dir": options.eval_data_dir, "problems": problems, "keys": options.keys}
    stream = stream_task(options.task, "train", options.data_dir, **how, say=say)
    first = next(stream, None)
    if first is None:
        raise PtmoeError(f"{options.task} ({options.data_dir or 'train'}) holds no example: needs at least one")
    return chain([first], stream)


def _parted(options: TrainOptions, stream: Iterator[Example]) -> tuple[list[Example], Iterator[Example]]:
    """The first examples of a training split, to validate on, and the others.

    Raises:
        PtmoeError: there are fewer others, or `max_examples` allows fewer.
    """
    assert options.validation_examples is not None
    wanted, most = options.validation_examples, options.max_examples
    first = list(islice(stream, 2 * wanted))
    count = len(first) if most is None else min(len(first), wanted + most)
    if count < 2 * wanted:
        raise PtmoeError(
            f"{count:,} examples, and {wanted:,} of them are to validate on: lower that (--validation-examples, or "
            f"--search-examples of ptmoe compare) to {count // 2:,} or less"
            if count > 1
            else "one example: a search needs some to train and others to validate on"
        )
    return first[:wanted], chain(first[wanted:], stream)


def _others(held_out: list[Example], stream: Iterator[Example], say: Callable[[str], None]) -> Iterator[Example]:
    """Those of a stream that repeat no input of the examples to validate on, up to case and white space."""
    inputs, kept, repeated = {folded(example.input) for example in held_out}, 0, 0
    for example in stream:
        if folded(example.input) in inputs:
            repeated += 1
        else:
            kept += 1
            yield example
    if not kept:
        raise PtmoeError("no example is left to train on: each has the input of one to validate on")
    if repeated:
        say(f"left out {repeated:,} training example(s) with the input of one to validate on")


def evaluation_split(options: TrainOptions) -> str:
    """What a run is evaluated on: `test`; with `validation_examples` the split `validation`, where each of its tasks
    has one, else a part of `train`."""
    if options.validation_examples is None:
        return "test"
    # A single file stands for every split, so it would be trained on as well.
    named = options.task is not None and not is_file(options.task) and not Path(options.data_dir or ".").is_file()
    held_out = named and all("validation" in TASKS[name].splits for name in task_names(str(options.task)))
    return "validation" if held_out else "train"


def evaluation_examples(options: TrainOptions, say: Callable[[str], None]) -> dict[str, list[Example]]:
    """The examples of each task in `eval_task`; by default the test splits of nano's own tasks; with
    `validation_examples` those.

    Raises:
        PtmoeError: missing or bad data, or tasks that cannot be scored as the options say.
    """
    trained, split, folder = options.task or str(options.data), evaluation_split(options), options.data_dir
    names = [trained] if options.task is None or is_file(trained) else task_names(trained)
    most: int | None = -(-(options.validation_examples or 0) // len(names))
    if split == "test":
        folder, most = evaluation_data_dir(options), options.eval_examples
        if options.eval_task is not None:
            names = listed_names(options.eval_task)
        elif is_file(trained) or not all(TASKS[name].generate for name in names):
            return {}
    check_data_dir(names, folder)
    if options.score == "choices":
        check_labels(map(task_named, names))
    if split == "train":
        found, _ = _parted(options, _stream(options, Problems(skip=options.skip_bad, at_once=True), say))
        of = {name: [example for example in found if example.domain == name] for name in names}  # `mixed` names them
        return {name: part for name, part in of.items() if part} if len(names) > 1 else {trained: found}
    tested = options.eval_data_dir
    limits: dict[str, Any] = {"max_examples": most, "eval_data_dir": tested, "keys": options.keys, "say": say}
    loaded = {}
    for name in names:
        problems = Problems(skip=options.skip_bad)
        loaded[name] = load_task(name, split, folder, problems=problems, **limits)
        for line in problems.notes():
            say(f"{name}: {line}")
    return loaded


class Fingerprint:
    """A hash of examples in their order, whatever makes tokens of them."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._hash = hashlib.sha256()
        for _ in self.watched(examples):
            pass

    def watched(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples as they are, each of which is added as it passes."""
        for example in examples:
            # Which characters `repr` escapes depends on the version of Python.
            self._hash.update(ascii((example.contents, example.references)).encode())
            yield example

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def examples_fingerprint(options: TrainOptions, say: Callable[[str], None]) -> str:
    """Of all examples to train and to evaluate on; downloaded, where they are not there yet.

    Raises:
        PtmoeError: missing or bad data, or fewer to train on than to validate on.
    """
    held_out = evaluation_examples(options, say).values()
    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    return str(Fingerprint(chain(*held_out, training_examples(options, problems, say))))


def fingerprints(options: TrainOptions, say: Callable[[str], None]) -> tuple[str, dict[str, str]]:
    """Of the examples to train on, and of those that each task is evaluated on, as a run records them.

    Raises:
        PtmoeError: missing or bad data.
    """
    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    return str(Fingerprint(training_examples(options, problems, say))), evaluated_fingerprints(
        evaluation_examples(options, say), forgetting_examples(options)
    )


def evaluated_fingerprints(held_out: dict[str, list[Example]], known: list[Example]) -> dict[str, str]:
    """By task, and those of the texts that show what a base forgets."""
    return {name: str(Fingerprint(examples)) for name, examples in {**held_out, FORGETTING: known}.items() if examples}


def forgetting_examples(options: SharedOptions) -> list[Example]:
    """What the base could do before: nano's skills with their instructions, or lines of a file, which have no target.

    Raises:
        PtmoeError: there is no such file, or no line in it.
    """
    if options.forgetting is None:
        return load_task("nano/skills", "validation", max_examples=NANO_TEXTS) if options.model == nano.NAME else []
    path = Path(options.forgetting)
    try:
        with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            lines = (line.strip() for line in iter(partial(text.readline, LONGEST_LINE), ""))
            texts = list(islice(filter(None, lines), MOST_TEXTS))
    except (*DAMAGED, ValueError) as error:  # the latter where it, or its name, is no text
        raise PtmoeError(f"forgetting {path}: {error}: needs a file with lines of text in UTF-8") from None
    if not texts:
        raise PtmoeError(f"forgetting {path}: no line of text, needs one at least")
    return [Example(f"{number}", line, "", (), FORGETTING) for number, line in enumerate(texts, start=1)]


def evaluation_data_dir(options: SharedOptions) -> str | None:
    """The folder or file that holds the data of evaluated tasks."""
    trained = options.data_dir
    return options.eval_data_dir or (trained if trained is not None and Path(trained).is_dir() else None)


def askable(
    held_out: dict[str, list[Example]],
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    chat: bool,
    say: Callable[[str], None],
) -> dict[str, list[Example]]:
    """The examples whose prompts can be made, found out before the training instead of after it."""
    from ptmoe.tasks.tokens import usable

    problems = Problems(skip=options.skip_bad)
    kept = {name: usable(examples, tokenizer, problems, chat=chat) for name, examples in held_out.items()}
    if problems.count:
        say(f"not evaluated: {problems.listed()}")
    return kept
