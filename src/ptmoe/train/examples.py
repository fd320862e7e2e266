"""The examples that a run trains and is evaluated on, as its options name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks import (
    TASKS,
    Problems,
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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example
    from ptmoe.train.options import SharedOptions, TrainOptions


def training_examples(options: TrainOptions, problems: Problems, say: Callable[[str], None]) -> Iterable[Example]:
    """The first is read at once, so that missing data is reported before the base is loaded; a task's others as they
    are needed, so that no data set has to fit into memory as text."""
    if options.task is None:
        assert options.data is not None
        keys = local_task.Keys(options.prompt_key, options.completion_key, options.separator)
        return local_task.load(options.data, keys, problems)[: options.max_examples]
    check_size(options.task, options.max_examples)
    stream = stream_task(options.task, "train", options.data_dir, problems=problems, say=say)
    first = next(stream, None)
    if first is None:
        raise PtmoeError(f"{options.task} ({options.data_dir or 'train'}) holds no example: needs at least one")
    return islice(chain([first], stream), options.max_examples)


def evaluation_examples(options: TrainOptions, say: Callable[[str], None]) -> dict[str, list[Example]]:
    """The examples of each task in `eval_task`; by default the test splits of nano's own tasks.

    Raises:
        PtmoeError: missing or bad data, or tasks that cannot be scored as the options say.
    """
    if options.eval_task is not None:
        names = listed_names(options.eval_task)
    else:
        names = [] if options.task is None or is_file(options.task) else task_names(options.task)
        if not all(TASKS[name].generate for name in names):
            return {}
    if options.score == "choices":
        check_labels(map(task_named, names))
    folder = evaluation_data_dir(options)
    limits: dict[str, Any] = {"max_examples": options.eval_examples, "say": say}
    return {name: load_task(name, "test", folder, problems=Problems(skip=options.skip_bad), **limits) for name in names}


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
