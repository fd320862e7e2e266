"""A conversation as the tokenizer's chat template writes it: with all that the record gives, the same every day.

Whatever the template refuses is a bad record, and so is one of which it leaves anything out: a message's text or
another key of it, a tool, a document, or an option that it does not read. Three things may be left out: what only links
a tool's answer to its call, what a tool's schema says beside names and descriptions, which each template writes in its
own way, and the reasoning of earlier answers, where the template writes that of the last.
"""

from __future__ import annotations

import copy
import json
import re
import string
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from ptmoe.errors import PtmoeError
from ptmoe.tasks.problems import BadRecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example

# Templates write today's date into every conversation, so that a prompt would differ from one day to the next. This is
# the default date in Llama 3.2's template, which reads `date_string`; others call `strftime_now`.
_TODAY = datetime(2024, 7, 26)
_REASONING = ("reasoning_content", "reasoning", "thinking")  # names that `transformers` gives to the same text
_NOT_OPTIONS = {"messages", "tools", "documents", "chat_template"}

Given = dict[str, Any]  # what a template is given: `messages`, `tools`, `documents`, and its options by name
Path = tuple[Any, ...]  # the keys and indices that lead to a value in it


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool
) -> str:
    """The text that the template makes of a conversation.

    Args:
        example: whose `template` the template is given as well.
        tokenizer: whose template it is.
        messages: of the conversation.
        add_generation_prompt: end it where the answer begins.

    Raises:
        BadRecordError: the template refuses the conversation, or leaves out a part of it.
        PtmoeError: there is no template.
    """
    require_template(tokenizer)
    options = example.template.get("chat_template_kwargs", {})
    if twice := options.keys() & {"messages", *example.template}:
        raise BadRecordError(f"'chat_template_kwargs' holds {', '.join(sorted(twice))}, which the line has itself")
    given = {"messages": messages, **options}
    given |= {name: example.template[name] for name in ("tools", "documents") if example.template.get(name)}
    text = _written(given, tokenizer, add_generation_prompt)
    if left_out := _left_out(given, text, tokenizer, add_generation_prompt):
        raise BadRecordError(
            f"the chat template leaves out {' and '.join(map(repr, left_out))}: remove that, or take a tokenizer "
            "whose template writes it"
        )
    return text


def _written(given: Given, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    """What the template writes, with the text of every message."""
    messages = given["messages"]
    others = {name: value for name, value in given.items() if name not in ("messages", "chat_template")}
    refusals = []
    in_parts = [
        {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message
        for message in messages
        for text in [message.get("content")]
    ]
    for form in (messages, in_parts):  # templates of vision models take parts alone, or leave out a plain text
        try:
            options = fixed_date(tokenizer, others.get("tools"), given.get("chat_template")) | others
            text = tokenizer.apply_chat_template(
                form, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except ImportError as error:
            raise PtmoeError(f"chat templates need jinja2: {error}") from None
        except Exception as error:  # a template may raise anything
            refusals.append(f"refuses it: {' '.join(str(error).split())[:300] or type(error).__name__}")
            continue
        written = _folded(text)
        said = [part for part in _must_be_there(messages) if part.strip()]
        each = [*map(_folded, said)]
        # What one message says may stand in another: it is there as often as in all of them.
        if all(
            _count(forms, [written]) >= _count(forms, each)
            for forms in ({_folded(form) for form in _forms(part)} for part in said)
        ):
            return cast(str, text)
        refusals.append("leaves out what a message says")
    raise BadRecordError(f"the chat template {refusals[0]}")


def _must_be_there(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What each message says. Of earlier answers templates leave out the reasoning."""
    for message in messages:
        earlier = message["role"] == "assistant" and message is not messages[-1]
        content = message.get("content")
        if isinstance(content, str):
            yield content.rpartition("</think>")[2].strip() if earlier and "</think>" in content else content


def _forms(said: str) -> Iterator[str]:
    """A text, and as templates write what a tool says."""
    yield said
    yield json.dumps(said, ensure_ascii=False)[1:-1]


def _folded(text: str) -> str:
    """Without white space: a template may strip texts, and set reasoning in lines of its own."""
    return "".join(text.split())


def _count(forms: set[str], texts: Iterable[str]) -> int:
    return sum(text.count(form) for text in texts for form in forms)


def respaced(
    example: Example, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]
) -> tuple[str, str] | None:
    """The first text of a message whose white space the template changes, and what it makes of it.

    Raises:
        BadRecordError: as `render`.
    """
    text = render(example, tokenizer, messages, add_generation_prompt=False)
    for number, message in enumerate(messages):
        said = message.get("content")
        if not isinstance(said, str):
            continue
        for less in (said.strip(), said.lstrip(), said.rstrip()):
            changed = [*messages[:number], {**message, "content": less}, *messages[number + 1 :]]
            if less != said and render(example, tokenizer, changed, add_generation_prompt=False) == text:
                return said, less
        inside = next(_must_be_there([message, *messages[number + 1 :]])).strip()
        if not any(form in text for form in _forms(inside)):
            found = re.search(r"\s*".join(map(re.escape, inside.split())), text)
            return inside, found[0] if found else ""
    return None


# ---- everything that a record gives ----------------------------------------------------------------------------------


def _left_out(given: Given, text: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> list[str]:
    """The names of what the template leaves out. What it writes is seen at once, with a word of its own in the place of
    each value; the others are taken away one by one, and count as left out where that changes nothing."""
    template = tokenizer.get_chat_template(given.get("chat_template"), given.get("tools"))
    options = [name for name, value in given.items() if name not in _NOT_OPTIONS and value is not None]
    names = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)]
    marks = {path: f"zq{number}zq" for number, path in enumerate(_parts(given))}
    if not marks:
        return names
    try:
        marked = _written(_marked(given, marks), tokenizer, add_generation_prompt).casefold()
    except BadRecordError:  # it looks at the values
        marked = ""

    def written(path: Path) -> bool:
        if marks[path] in marked or _changes(given, path, text, tokenizer, add_generation_prompt):
            return True
        if path[0] != "messages" or path[2] not in _REASONING or path[1] == len(given["messages"]) - 1:
            return False
        until = {**given, "messages": given["messages"][: path[1] + 1]}  # then it is the last answer's
        try:
            return _changes(until, path, _written(until, tokenizer, False), tokenizer, False)
        except BadRecordError:  # no conversation may end there
            return False

    unseen = {path for path in marks if not written(path)}
    for part in dict.fromkeys(map(_part, marks)):
        of_part = [path for path in marks if _part(path) == part]
        lacking = [path for path in of_part if path in unseen]
        # A part of which nothing is written goes by its own name.
        names += [part] if lacking == of_part else [".".join(k for k in path if isinstance(k, str)) for path in lacking]
    return list(dict.fromkeys(name.removeprefix("messages.") for name in names))


def _part(path: Path) -> str:
    return str(path[2] if path[0] == "messages" else path[0])


def _parts(given: Given) -> Iterator[Path]:
    """Where a conversation holds something beside roles and texts."""
    for name in ("tools", "documents"):
        values = [path for path, _ in _values(given.get(name), (name,))]
        said = [path for path in values if path[-1] in ("name", "description")] if name == "tools" else []
        yield from said or values
    called: list[Any] = []  # the names of tools
    for number, message in enumerate(given["messages"]):
        for path, value in _values(message, ("messages", number)):
            key = path[2:]
            link = key == ("tool_call_id",) or (key[0] == "tool_calls" and len(key) == 3 and key[2] in ("id", "type"))
            answers = key == ("name",) and message["role"] == "tool" and value in called
            if key[0] not in ("role", "content") and not link and not answers:
                yield path
            if key[0] == "tool_calls" and key[-1] == "name":
                called.append(value)


def _values(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The texts, numbers and truth values in a value, and where they stand."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _values(inner, (*path, key))
    elif value is not None and value != "":
        yield path, value


def _marked(value: Any, marks: dict[Path, str], path: Path = ()) -> Any:
    if isinstance(value, dict):
        return {key: _marked(inner, marks, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [_marked(inner, marks, (*path, index)) for index, inner in enumerate(value)]
    return marks.get(path, value)


def _changes(
    given: Given, path: Path, text: str, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool
) -> bool:
    """Whether the template writes something else where a value is taken away; it may also insist on it."""
    without: Any = copy.deepcopy(given)
    place = without
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    try:
        return _written(without, tokenizer, add_generation_prompt) != text
    except BadRecordError:
        return True


# ---- dates -----------------------------------------------------------------------------------------------------------


def fixed_date(tokenizer: PreTrainedTokenizerBase, tools: Any = None, template: str | None = None) -> dict[str, Any]:
    """Options of `apply_chat_template` with which a template writes one date instead of today's.

    Args:
        tokenizer: whose template it is.
        tools: of the conversation, for which a tokenizer may have a template of its own.
        template: another one, or the name of one; None for the tokenizer's.
    """
    text = tokenizer.get_chat_template(template, tools)
    clock = _fixed_clock() if "strftime_now" in text else ""
    return {"date_string": "26 Jul 2024", **({"chat_template": clock + text} if clock or template else {})}


@lru_cache(maxsize=1)
def _fixed_clock() -> str:
    """A macro that takes the place of the `strftime_now` that `transformers` gives to a template."""
    values = {f"%{letter}": _TODAY.strftime(f"%{letter}") for letter in string.ascii_letters}
    known = {directive: value for directive, value in values.items() if value and not value.startswith("%")}
    known |= {f"%-{directive[1]}": value.lstrip("0") or "0" for directive, value in known.items() if value.isdigit()}
    replaced = "".join(f" | replace('{directive}', '{value}')" for directive, value in known.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise PtmoeError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template for data with messages: "
            "give prompt and completion instead, or omit --chat"
        )
