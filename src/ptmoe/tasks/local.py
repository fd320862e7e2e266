r"""A user's own JSON lines; what a line is follows from its keys.

    {"prompt": "2 + 2 =", "completion": " 4"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"question": "Where?", "context": "The key is in the box.", "answers": ["in the box", "the box"]}

An `id` and a `domain` are taken over where they are there. Other keys are mapped by name, as for GSM8K's own file:
`Keys(prompt="question", completion="answer", separator="\n")`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.tasks.base import Example

SHOWN = 5  # bad lines named in an error; all are counted


@dataclass(frozen=True)
class Keys:
    """Which keys hold the prompt and the completion, and what is put between the two."""

    prompt: str | None = None
    completion: str | None = None
    separator: str = ""


class _BadLineError(ValueError):
    pass


def load(path: str | Path, keys: Keys | None = None) -> list[Example]:
    """Every example of a JSON-lines file, or of each `*.jsonl` in a folder.

    Raises:
        PtmoeError: no such file, an empty one, or bad lines: the first are named, all are counted.
    """
    keys = keys or Keys()
    if (keys.prompt is None) != (keys.completion is None):
        raise PtmoeError(f"prompt key {keys.prompt!r}, completion key {keys.completion!r}: give both or neither")
    path = Path(path)
    if not path.exists():
        raise PtmoeError(f"no data file {path}: give a JSON-lines file or a folder of them")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise PtmoeError(f"the folder {path} has no *.jsonl file")
    examples: list[Example] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for file in files:
        for number, line in _lines(file):
            try:
                example = _example(_record(line), keys, f"{file.stem}-{number}", str(path))
                if example.id in seen:
                    raise _BadLineError(f"id {example.id!r} was used before, at {seen[example.id]}")
            except _BadLineError as problem:
                problems.append(f"{file}:{number}: {problem}")
            else:
                seen[example.id] = f"{file}:{number}"
                examples.append(example)
    if problems:
        more = f"\n  … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise PtmoeError(f"{len(problems)} bad line(s) in {path}; mend or remove them:\n  {listed}{more}")
    if not examples:
        raise PtmoeError(f"{path} holds no example: needs at least one JSON line")
    return examples


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, line


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _BadLineError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise _BadLineError(f"a JSON {type(record).__name__}, needs an object")
    return record


def _example(record: dict[str, Any], keys: Keys, default_id: str, task: str) -> Example:
    messages: tuple[dict[str, Any], ...] = ()
    if keys.prompt is not None and keys.completion is not None:
        prompt, completion = _text(record, keys.prompt) + keys.separator, _text(record, keys.completion)
        references: tuple[str, ...] = (completion.strip(),)
    elif "messages" in record:
        messages, completion = _conversation(record["messages"])
        prompt, references = "\n".join(f"{m['role']}: {m['content']}" for m in messages), (completion.strip(),)
    elif "prompt" in record:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        references = (completion.strip(),)
    elif "question" in record:
        references = _answers(record)
        context = f"{_text(record, 'context')}\n\n" if record.get("context") is not None else ""
        prompt, completion = f"{context}Question: {_text(record, 'question')}\nAnswer:", f" {references[0]}"
    else:
        raise _BadLineError(
            f"has the keys {', '.join(map(repr, record)) or 'none'}: needs prompt and completion, messages, or "
            "question and answers; map other keys with --prompt-key and --completion-key"
        )
    if not completion.strip():
        raise _BadLineError("the completion is empty")
    if not prompt.strip():
        raise _BadLineError("the prompt is empty")
    return Example(
        id=str(record.get("id", default_id)),
        input=prompt,
        target=completion,
        references=references,
        task=task,
        domain=str(record.get("domain", "")),
        messages=messages,
    )


def _text(record: dict[str, Any], key: str) -> str:
    if key not in record:
        raise _BadLineError(f"lacks the key {key!r} (has {', '.join(map(repr, record))})")
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _BadLineError(f"{key!r} is {type(value).__name__}, needs text")
    return value


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    if "answers" not in record:
        raise _BadLineError(f"lacks the key 'answers' (has {', '.join(map(repr, record))})")
    answers = record["answers"]
    if isinstance(answers, dict):  # the form SQuAD has on the Hub
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise _BadLineError("'answers' needs a list of one text or more, none empty")
    return tuple(answers)


def _conversation(value: Any) -> tuple[tuple[dict[str, Any], ...], str]:
    if not isinstance(value, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise _BadLineError('\'messages\' needs a list of {"role": …, "content": …}')
    if len(value) < 2 or value[-1]["role"] != "assistant":
        raise _BadLineError("'messages' must end with the assistant's answer, after at least one other message")
    return tuple(value[:-1]), value[-1]["content"]
