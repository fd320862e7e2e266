r"""The user's own JSON lines; a line's keys decide its form.

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"question": "Where?", "context": "The key is in the box.", "answers": ["in the box", "the box"]}

`id` and `domain` are optional. Other keys are mapped by name, as for GSM8K's own file:
`Keys(prompt="question", completion="answer", separator="\n")`.

A line with `messages` may have `tools`, `documents` and `chat_template_kwargs`, as for `trl`. They and every key of a
message reach the chat template. The last message is the answer; earlier ones are part of the prompt.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Format, Task, collect
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.records import has, head_text, json_lines, name_of, text_of

FOR_THE_TEMPLATE = ("tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True)
class Keys:
    """The keys that hold the prompt and the completion, and the text between the two."""

    prompt: str | None = None
    completion: str | None = None
    separator: str = ""


def load(path: str | Path, keys: Keys | None = None, problems: Problems | None = None) -> list[Example]:
    """All examples of a JSON-lines file, or of each `*.jsonl` in a folder.

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
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise PtmoeError(f"the folder {path} has no *.jsonl file")
    for file in files:
        if other := other_form(file):
            raise PtmoeError(f"{file} is {other}; needs JSON lines, one object a line")
        for place, record in json_lines(file, problems):
            with problems.at(place):
                default_id = f"{file.stem}-{place.rpartition(':')[2]}"
                yield place, _example(record, keys, default_id, str(path)).read_at(place)


def other_form(path: Path) -> str:
    """What a file is that holds no JSON lines, not even damaged ones, and how to convert it; "" for JSON lines."""
    text = (head_text(path) or "").strip()
    convert = "convert it with: python -c \"import csv, json; [print(json.dumps(row)) for row in {}(open('{}'))]\""
    if re.match(r"\[\s*(?:\{|\]|$)", text):
        return f"a JSON array: {convert.format('json.load', path)} > data.jsonl"
    if re.match(r"\{\s*\n", text):
        return "one JSON object over several lines"
    if text.startswith("<"):
        return "XML or HTML"
    if re.match(r"[^\n\0]*[,;\t]", text) and not re.search(r"^\s*\{", text, re.MULTILINE):
        return f"CSV: {convert.format('csv.DictReader', path)} > data.jsonl"
    return ""


def task(name: str) -> Task:
    """The task of a JSON-lines file: graded verbatim."""
    form = Format(
        "JSON lines of prompts and completions",
        "{",
        ("prompt completion", "messages", "question answers"),
        lambda record, origin: _example(record, Keys(), origin.id, origin.task),
    )
    return Task(name, {}, grader="verbatim", metric="accuracy", max_new_tokens=64, formats=(form,), chat=False)


def _example(record: dict[str, Any], keys: Keys, default_id: str, task: str) -> Example:
    messages: tuple[dict[str, Any], ...] = ()
    reply: dict[str, Any] = {}
    template: dict[str, Any] = {}
    context, answer = (0, 0), None
    references: tuple[str, ...] = ()
    if keys.prompt is not None and keys.completion is not None:
        prompt, completion = text_of(record, keys.prompt) + keys.separator, text_of(record, keys.completion)
    elif "messages" in record:
        for key in ("messages", *FOR_THE_TEMPLATE):
            _check_numbers(key, record.get(key))
        messages, completion, reply = _conversation(record["messages"])
        prompt = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)
        template = _for_the_template(record)
    elif "prompt" in record:
        prompt, completion = text_of(record, "prompt"), text_of(record, "completion")
    elif "question" in record:
        references = _answers(record)
        passage = text_of(record, "context") if record.get("context") is not None else ""
        prompt, context = prompts.question(text_of(record, "question"), passage)
        completion, found = f" {references[0]}", passage.find(references[0])
        answer = (found, found + len(references[0])) if found >= 0 else None
    else:
        raise BadRecordError(
            f"has the keys {', '.join(map(repr, record)) or 'none'}: needs prompt and completion, messages, or "
            "question and answers; map other keys with --prompt-key and --completion-key"
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
        template=template,
        context=context,
        answer=answer,
    )


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


def _for_the_template(record: dict[str, Any]) -> dict[str, Any]:
    given = {key: record[key] for key in FOR_THE_TEMPLATE if record.get(key)}
    for key in ("tools", "documents"):
        value = given.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise BadRecordError(f"{key!r} needs a list of objects")
    if not isinstance(given.get("chat_template_kwargs", {}), dict):
        raise BadRecordError("'chat_template_kwargs' needs an object")
    return given
