"""`ptmoe params` and `ptmoe tasks`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ptmoe.cli.console import Console
from ptmoe.cli.options import DataDir, Model, NamedSplit, SkipBad, given
from ptmoe.errors import PtmoeError, near
from ptmoe.files import printable

if TYPE_CHECKING:
    from ptmoe.tasks.base import Task


def params(
    context: typer.Context,
    model: Model = "nano",
    method: Annotated[
        str | None, typer.Option(help="one method, or with fields as in pt-moe:rank=8; by default all methods")
    ] = None,
    num_virtual_tokens: Annotated[int | None, typer.Option(help="T, length of the soft prompt")] = None,
    num_experts: Annotated[int | None, typer.Option(help="N, number of expert factors or prompts")] = None,
    rank: Annotated[int | None, typer.Option(help="R, of the factors")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="pick each method's free size to come closest without exceeding it: 80k, 1.5M"),
    ] = None,
) -> None:
    """Count each method's trainable parameters on a base. Only the base's config is read, no weights."""
    from ptmoe.compare.budget import fit_budget, size_text
    from ptmoe.compare.plan import parse_budget
    from ptmoe.methods import METHODS, method_named
    from ptmoe.models.attach import count_parameters
    from ptmoe.models.bases import load_config, quiet
    from ptmoe.train.options import method_entry

    quiet()
    fields = given(num_virtual_tokens=num_virtual_tokens, num_experts=num_experts, rank=rank)
    if method is not None:
        fields = {**method_entry(method), **fields}
        method = str(fields.pop("name"))
        known = method_named(method).model_fields | method_named(method).shorthands
        if unknown := sorted(fields.keys() - known.keys()):
            raise PtmoeError(f"{method} has no {', '.join(unknown)}{near(unknown[0], known)}")
    limit = None if budget is None else parse_budget(budget)
    config = load_config(model, **context.obj)
    table = Table("method", "configuration")
    for column in ("trainable parameters", *([] if limit is None else ["of the budget"])):
        table.add_column(column, justify="right")
    for name, kind in METHODS.items() if method is None else [(method, method_named(method))]:
        sizes = {key: value for key, value in fields.items() if method is not None or key in kind.model_fields}
        try:
            chosen = kind(**sizes) if limit is None else fit_budget(config, kind, limit, sizes)
            count = count_parameters(config, chosen)
        except PtmoeError as error:
            if method is not None:
                raise
            table.add_row(name, str(error), "–")
            continue
        share = [] if limit is None else [f"{100 * count / limit:.1f} %"]
        table.add_row(name, size_text(chosen), f"{count:,}", *share)
    console = Console()
    asked = "" if limit is None else f", budget {limit:,}"
    console.print(f"{model}: hidden size {config.get_text_config().hidden_size}{asked}")
    console.print(table)


def tasks(context: typer.Context, data_dir: DataDir = None) -> None:
    """List the named tasks: their splits, licence and source, and which of them are on this machine."""
    if context.invoked_subcommand is not None:
        return
    from ptmoe.tasks import GROUPS, TASKS

    table = Table()
    table.add_column("task", no_wrap=True)
    splits = list(dict.fromkeys(split for task in TASKS.values() for split in task.splits))
    for split in splits:
        table.add_column(split, justify="right")
    table.add_column("licence")
    table.add_column("here")
    notes = []
    for task in TASKS.values():
        sizes = [
            "–" if split not in task.splits else "?" if (size := task.splits[split].examples) is None else f"{size:,}"
            for split in splits
        ]
        table.add_row(task.name, *sizes, task.licence, _here(task, data_dir))
        about = (task.name.partition("/")[0], task.source, task.note)
        alike = [other for other in TASKS.values() if (other.name.partition("/")[0], other.source, other.note) == about]
        family = f"{about[0]}/*" if len(alike) > 1 else task.name
        notes.append(f"{family}: {task.source}; {task.note}".rstrip("; "))
    console = Console(highlight=False)
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(note)
    for name, members in GROUPS.items():
        console.print(f"group {name}: {', '.join(members)}")
    console.print(
        "A task is downloaded when used, or read from --data-dir or $PTMOE_DATA_DIR. A JSON-lines file is a task too."
    )


def _here(task: Task, data_dir: str | None) -> str:
    """The splits that are on this machine, as far as can be told without a download."""
    from ptmoe.tasks import TASKS, sources

    if task.generate is not None:
        return "generated"
    if task.parts:
        parts = [_here(TASKS[part], data_dir).split(", ") for part in task.parts]
        return ", ".join(split for split in task.splits if all(split in part for part in parts)) or "–"
    found = []
    for name, split in task.splits.items():
        try:
            path = sources.in_folder(task, name, Path(data_dir)) if data_dir else sources.present(task, name)
        except PtmoeError:
            path = None
        if path is not None or (split.hub and not data_dir and sources.on_hub_disk(task)):
            found.append(name)
    return ", ".join(found) or "–"


def tasks_show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a named task, a group, a mixture or a JSON-lines file")],
    split: NamedSplit = "test",
    data_dir: DataDir = None,
    examples: Annotated[int, typer.Option(min=1)] = 4,
    skip_bad: SkipBad = False,
    model: Model = "nano",
    chat: Annotated[bool | None, typer.Option(help="the tokenizer's chat template; by default for named tasks")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="real tokens of an example to train on, or of a prompt to answer; contexts are cut"),
    ] = None,
    num_virtual_tokens: Annotated[int, typer.Option(min=0, help="T, length of the soft prompt")] = 40,
    tokens: Annotated[bool, typer.Option("--tokens", help="show each token, special ones as ‹name›")] = False,
) -> None:
    """Print examples as the model sees them, with the virtual tokens' place, what is cut and what is supervised."""
    from ptmoe.models.bases import load_tokenizer, quiet
    from ptmoe.tasks import Problems, is_file, stream_task, task_named
    from ptmoe.tasks.tokens import (
        TextCheck,
        answer_limits,
        decoded,
        encode_completion,
        encode_prompt,
        row_length,
        token_texts,
        uses_chat,
    )

    quiet()
    tokenizer, positions = load_tokenizer(model, **context.obj)
    task = task_named(name)
    chat = uses_chat(task, tokenizer, chat)
    problems = Problems(skip=skip_bad, at_once=True)
    training = split == "train" or is_file(name)
    virtual = f"[P_1 … P_{num_virtual_tokens}]"
    _print(f"{virtual} virtual tokens   ⟦…⟧ the completion, supervised in training   ✂ tokens cut")
    if training:
        room: int | None = row_length(positions, num_virtual_tokens, max_length)
        limited, cut = "", "example is cut around the answer, as in training"
    else:
        _, room = answer_limits(positions, num_virtual_tokens, task.max_new_tokens, max_length=max_length)
        limited, cut = " of a prompt", "context is cut from its end, as in evaluation"
    if room is not None:
        _print(f"at most {room:,} tokens{limited}; a longer {cut}")
    check = TextCheck(tokenizer, chat=chat)
    for example in islice(stream_task(name, split, data_dir, problems=problems), examples):
        with problems.at(example.where):
            completion = encode_completion(example, tokenizer, chat=chat)
            fits = room - len(completion) if training and room is not None else room
            prompt = encode_prompt(example, tokenizer, chat=chat, room=fits, around_answer=training)
            length = (
                f"{len(prompt.ids)} + {len(completion)} tokens" if prompt else "does not fit even without its context"
            )
            _print(f"\n[{example.id}{', ' + example.domain if example.domain else ''}: {length}]")
            if prompt is None:
                continue
            (before, after), (first, last) = prompt.cut, prompt.context
            texts = [decoded(tokenizer, ids) for ids in (prompt.ids[:first], prompt.ids[first:last], prompt.ids[last:])]
            shown = texts[0] + f"✂{before}✂" * bool(before) + texts[1] + f"✂{after}✂" * bool(after) + texts[2]
            _print(f"{virtual}{shown}⟦{decoded(tokenizer, completion)}⟧")
            if tokens:
                parts = [" ".join(token_texts(ids, tokenizer)) for ids in (prompt.ids, completion)]
                _print(f"tokens: {virtual} {parts[0]} ⟦{parts[1]}⟧")
            if change := check.look(example):
                _print(f"warning: {change}")
            _print(f"right: {' | '.join(example.references)}")
    for line in problems.notes():
        _print(line)


def _print(text: str) -> None:
    print(printable(text))
