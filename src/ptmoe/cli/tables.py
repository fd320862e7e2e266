"""`ptmoe params` and `ptmoe tasks`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ptmoe.errors import PtmoeError, near

if TYPE_CHECKING:
    from ptmoe.tasks.base import Task


def params(model: str, revision: str | None, method: str | None, fields: dict[str, Any], budget: str | None) -> None:
    """Print each method's trainable parameters on a base; with a budget, at the size that fits it."""
    from ptmoe.compare.budget import base_config, fit_budget, parse_budget, sizes_of
    from ptmoe.methods import METHODS
    from ptmoe.models.attach import count_parameters
    from ptmoe.train.options import method_entry

    if method is not None:
        fields = {**method_entry(method), **fields}
        method = str(fields.pop("name"))
    if method is not None and method not in METHODS:
        raise PtmoeError(f"unknown method {method!r}{near(method, METHODS)}")
    limit = None if budget is None else parse_budget(budget)
    config = base_config(model, revision)
    table = Table("method", "configuration")
    table.add_column("trainable parameters", justify="right")
    if limit is not None:
        table.add_column("of the budget", justify="right")
    for name, method_config in METHODS.items():
        if method not in (None, name):
            continue
        sizes = {key: value for key, value in fields.items() if key in method_config.model_fields}
        if method is not None and (unknown := sorted(fields.keys() - sizes.keys())):
            raise PtmoeError(f"{name} has no {', '.join(unknown)}{near(unknown[0], method_config.model_fields)}")
        try:
            chosen = method_config(**sizes) if limit is None else fit_budget(config, method_config, limit, sizes)
            count = count_parameters(config, chosen)
        except PtmoeError as error:
            if method is not None:
                raise
            table.add_row(name, str(error), "–")
            continue
        share = [] if limit is None else [f"{100 * count / limit:.1f} %"]
        size = ", ".join(f"{key}={value}" for key, value in sizes_of(chosen).items())
        table.add_row(name, size or "–", f"{count:,}", *share)
    console = Console()
    asked = "" if limit is None else f", budget {limit:,}"
    console.print(f"{model}: hidden size {config.get_text_config().hidden_size}{asked}")
    console.print(table)


def tasks(data_dir: str | None) -> None:
    """Print the named tasks, their splits, licence and source, and which of them are on this machine."""
    from ptmoe.tasks import GROUPS, TASKS

    table = Table()
    table.add_column("task", no_wrap=True)
    names = list(dict.fromkeys(split for task in TASKS.values() for split in task.splits))
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("licence")
    table.add_column("here")
    for task in TASKS.values():
        sizes = [_size(task, name) for name in names]
        table.add_row(task.name, *sizes, task.licence, _here(task, data_dir))
    console = Console(highlight=False)
    console.print(table)
    for note in dict.fromkeys(f"{_family(task)}: {task.source}; {task.note}".rstrip("; ") for task in TASKS.values()):
        console.print(note)
    for name, members in GROUPS.items():
        console.print(f"group {name}: {', '.join(members)}")
    console.print(
        "A task is downloaded when used, or read from --data-dir or $PTMOE_DATA_DIR. A JSON-lines file is a task too."
    )


def _size(task: Task, split: str) -> str:
    if split not in task.splits:
        return "–"
    examples = task.splits[split].examples
    return "?" if examples is None else f"{examples:,}"


def _family(task: Task) -> str:
    return "mrqa/*" if task.name.startswith("mrqa/") else task.name


def _here(task: Task, data_dir: str | None) -> str:
    """The splits that are on this machine, as far as can be told without a download."""
    from ptmoe.tasks import sources

    if task.generate is not None:
        return "generated"
    found = []
    for name, split in task.splits.items():
        try:
            path = sources.in_folder(task, name, Path(data_dir)) if data_dir else sources.local(task, name)
        except PtmoeError:
            path = None
        if path is not None or (split.hub and not data_dir and sources.on_hub_disk(task)):
            found.append(name)
    return ", ".join(found) or "–"


def tasks_show(
    name: str,
    split: str,
    data_dir: str | None,
    count: int,
    base: dict[str, Any],
    chat: bool | None,
    max_length: int | None,
    num_virtual_tokens: int,
    *,
    skip_bad: bool,
) -> None:
    """Print examples as the model sees them."""
    from ptmoe.models.bases import load_tokenizer, quiet
    from ptmoe.tasks import Problems, is_file, stream_task, task_named
    from ptmoe.tasks.tokens import encode_completion, encode_prompt, uses_chat

    quiet()
    tokenizer, positions = load_tokenizer(**base)
    chat = uses_chat(task_named(name), tokenizer, chat)
    room = min(max_length or 2**31, (positions or 2**31) - num_virtual_tokens)
    problems = Problems(skip=skip_bad, at_once=True)
    training = split == "train" or is_file(name)
    print(f"[P_1 … P_{num_virtual_tokens}] virtual tokens   ⟦…⟧ the completion, supervised in training   ✂ tokens cut")
    where = "around the answer, as in training" if training else "from the end of the context, as in evaluation"
    print(f"at most {room:,} tokens; a longer example is cut {where}")
    for example in islice(stream_task(name, split, data_dir, problems=problems), count):
        completion = encode_completion(example, tokenizer, chat=chat)
        fits = room - len(completion)
        prompt = encode_prompt(example, tokenizer, chat=chat, room=fits, around_answer=training)
        length = f"{len(prompt.ids)} + {len(completion)} tokens" if prompt else "does not fit even without its context"
        print(f"\n[{example.id}{', ' + example.domain if example.domain else ''}: {length}]")
        if prompt is None:
            continue
        (before, after), (first, last) = prompt.cut, prompt.context
        texts = [tokenizer.decode(ids) for ids in (prompt.ids[:first], prompt.ids[first:last], prompt.ids[last:])]
        shown = texts[0] + f"✂{before}✂" * bool(before) + texts[1] + f"✂{after}✂" * bool(after) + texts[2]
        print(f"[P_1 … P_{num_virtual_tokens}]{shown}⟦{tokenizer.decode(completion)}⟧")
        print(f"right: {' | '.join(example.references)}")
    if problems.count:
        print(f"left out {problems.listed()}")
