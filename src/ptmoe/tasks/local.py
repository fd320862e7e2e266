r"""The user's own JSON lines; a line's keys decide its form.

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"question": "Where?", "context": "The key is in the box.", "answers": ["in the box", "the box"]}

`id` and `domain` are optional. Other keys are mapped by name, as for GSM8K's own file:
`Keys(prompt="question", completion="answer", separator="\n")`.

A line may have `tools`, `documents` and `chat_template_kwargs`, as for `trl`. They and every key of a message reach the
chat template, or the line is refused. The last message is the answer; earlier ones are part of the prompt.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Format, Task, collect
from ptmoe.tasks.other_files import other_form
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.records import has, json_lines, name_of, text_of

FOR_THE_TEMPLATE = ("tools", "documents", "chat_template_kwargs")
FORMS = {
    "messages": {"messages"},
    "prompt": {"prompt", "completion"},
    "question": {"question", "context", "answers"},
}
LINES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Keys:
    """The keys that hold the prompt and the completion, and the text between the two; with `where_there` only of lines
    that have the prompt's."""

    prompt: str | None = None
    completion: str | None = None
    separator: str = ""
    where_there: bool = False


def load(path: str | Path, keys: Keys | None = None, problems: Problems | None = None) -> list[Example]:
    """All examples of a JSON-lines file, or of each `*.jsonl` and `*.jsonl.gz` in a folder.

    Raises:
        PtmoeError: no such file, an empty file, or bad lines: all are counted, the first are named.
    """
    problems = problems if problems is not None else Problems()
    return collect(read(Path(path), problems, keys), problems, str(path))


def read(path: Path, problems: Problems, keys: Keys | None = None) -> Iterator[tuple[str, Example]]:
    """Each example with its location; a line without an `id` gets one from its file and number."""
    keys = keys or Keys()
    if (keys.prompt is None) != (keys.completion is None):
        raise PtmoeError(f"prompt key {keys.prompt!r}, completion key {keys.completion!r}: give both or neither")
    if not os.path.exists(path):  # also where the name is too long for one
        raise PtmoeError(f"no data file {path}: give a JSON-lines file or a folder of them")
    files = sorted(file for file in path.iterdir() if file.name.endswith(LINES)) if path.is_dir() else [path]
    if not files:
        raise PtmoeError(f"the folder {path} has no *.jsonl or *.jsonl.gz file")
    for file in files:
        if other := other_form(file):
            raise PtmoeError(f"{file} is {other}; needs JSON lines, one object a line")
        for place, record in json_lines(file, problems):
            with problems.at(place):
                default_id = f"{Path(file.name.removesuffix('.gz')).stem}-{place.rpartition(':')[2]}"
                example = _example(record, keys, default_id, str(path)).read_at(place)
                for key in _unread(record, keys):
                    problems.unread.setdefault(key, place)
                yield place, example


def task(name: str) -> Task:
    """The task of a JSON-lines file: graded verbatim."""
    form = Format(
        "JSON lines of prompts and completions",
        "{",
        ("prompt completion", "messages", "question answers"),
        lambda record, origin: _example(record, Keys(), origin.id, origin.task),
    )
    return Task(
        name, {}, grader="verbatim", metric="accuracy", max_new_tokens=64, formats=(form,), chat=False, file=name
    )


def _example(record: dict[str, Any], keys: Keys, default_id: str, task: str) -> Example:
    messages: tuple[dict[str, Any], ...] = ()
    reply: dict[str, Any] = {}
    context, answer = (0, 0), None
    references: tuple[str, ...] = ()
    mapped = keys.prompt is not None and (keys.prompt in record or not keys.where_there)
    form = "mapped" if mapped else _form(record)
    if mapped and keys.prompt is not None and keys.completion is not None:
        prompt, completion = text_of(record, keys.prompt) + keys.separator, text_of(record, keys.completion)
    elif form == "messages":
        _check_numbers("messages", record["messages"])
        messages, completion, reply = _conversation(record["messages"])
        prompt = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
    elif form == "prompt":
        prompt, completion = text_of(record, "prompt"), text_of(record, "completion")
    elif form == "question":
        references = _answers(record)
        passage = text_of(record, "context") if record.get("context") is not None else ""
        prompt, context = prompts.question(text_of(record, "question"), passage)
        completion, found = f" {references[0]}", passage.find(references[0])
        answer = (found, found + len(references[0])) if found >= 0 else None
    else:
        raise BadRecordError(
            f"has the keys {', '.join(map(repr, record)) or 'none'}: needs prompt and completion, messages, or "
            "question and answers; rename others (for ptmoe train --data, --prompt-key and --completion-key map them)"
        )
    for name, text in (("completion", completion), ("prompt", prompt)):
        if not text.strip():
            raise BadRecordError(f"the {name} is empty")
    return Example(
        id=name_of(record, "id", default_id),
        input=prompt,
        target=completion,
        references=references or (completion.strip(),),
        task=task,
        domain=name_of(record, "domain", ""),
        messages=messages,
        reply=reply,
        template=_for_the_template(record, {keys.prompt, keys.completion} if mapped else set()),
        context=context,
        answer=answer,
    )


def _form(record: dict[str, Any]) -> str:
    """The key that says which form a line has; a key that is null counts as not given, as exports of mixed lines have
    it.

    Raises:
        BadRecordError: it has several, of which all but one would be ignored.
    """
    given = {key for key, value in record.items() if value is not None} or record.keys()
    forms = [
        *(["messages"] if "messages" in given else []),
        *(["prompt"] if "prompt" in given or ("messages" in given and "completion" in given) else []),
        *(["question"] if {"question", "answers"} <= given else []),
    ]
    if len(forms) > 1:
        parts = {"messages": "messages", "prompt": "prompt and completion", "question": "question and answers"}
        raise BadRecordError(f"has {' as well as '.join(parts[form] for form in forms)}: needs one of them alone")
    return next((key for key in (*forms, "messages", "prompt", "question") if key in record), "")


def _unread(record: dict[str, Any], keys: Keys) -> set[str]:
    """The keys of a good record that hold something, and that its example is not made of."""
    read = {keys.prompt, keys.completion} if keys.prompt is not None else FORMS[_form(record)]
    filled = {key for key, value in record.items() if value not in (None, "", [], {})}
    return filled - read - {"id", "domain", *FOR_THE_TEMPLATE}


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    if "answers" not in record:
        raise BadRecordError(f"lacks the key 'answers' {has(record)}")
    answers = record["answers"]
    if isinstance(answers, dict):  # SQuAD's form on the Hub
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise BadRecordError("'answers' needs a list of one text or more, none empty")
    return tuple(answers)


def _conversation(value: Any) -> tuple[tuple[dict[str, Any], ...], str, dict[str, Any]]:
    """A conversation's messages, its final answer, and what else the answer's message holds."""
    if not isinstance(value, list) or not all(
        isinstance(m, dict)
        and isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or (m.get("content") is None and m.get("tool_calls")))
        for m in value
    ):
        raise BadRecordError('\'messages\' needs a list of {"role": …, "content": …}')
    if len(value) < 2 or value[-1]["role"] != "assistant":
        raise BadRecordError("'messages' must end with the assistant's answer, after at least one other message")
    *before, answer = value
    if answer.get("content") is None:
        raise BadRecordError("the assistant's answer needs a text as its 'content': it is what is graded")
    reply = {key: part for key, part in answer.items() if key not in ("role", "content") and part is not None}
    return tuple(before), answer["content"], reply


def _check_numbers(key: str, value: Any) -> None:
    """A template writes numbers as JSON does: with 17 digits, and NaN as a word."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(key, part)
    elif isinstance(value, float) and not _exact(value):
        raise BadRecordError(f"{key!r} holds the number {value}, which a chat template cannot write: give it as text")


def _exact(value: float) -> bool:
    try:
        return math.isfinite(value) and Decimal(str(value)) == Decimal(float.__repr__(value))
    except InvalidOperation:  # an exponent of twenty digits
        return False


def _for_the_template(record: dict[str, Any], mapped: set[str | None]) -> dict[str, Any]:
    given = {key: record[key] for key in FOR_THE_TEMPLATE if record.get(key) and key not in mapped}
    for key, value in given.items():
        _check_numbers(key, value)
        if key == "chat_template_kwargs" and not isinstance(value, dict):
            raise BadRecordError(f"{key!r} needs an object")
        if key != "chat_template_kwargs" and (
            not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value)
        ):
            raise BadRecordError(f"{key!r} needs a list of objects")
    return given
