"""A conversation as the tokenizer's chat template writes it: with everything that the record gives, the same every day.

Whatever the template refuses is a bad record, and so is one whose text, reasoning, tool calls or tools it leaves out.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
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


def render(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: bool = True,
) -> str:
    """The text that the template makes of a conversation.

    Args:
        example: whose `template` the template is given as well.
        tokenizer: whose template it is.
        messages: of the conversation.
        add_generation_prompt: end it where the answer begins.
        tools: give the template the example's tools.

    Raises:
        BadRecordError: the template refuses the conversation, or leaves out what a message says.
        PtmoeError: there is no template.
    """
    require_template(tokenizer)
    options = dict(example.template.get("chat_template_kwargs", {}))
    for name in ("tools", "documents"):
        if example.template.get(name) and (tools or name != "tools"):
            options[name] = example.template[name]
    refusals = []
    in_parts = [
        {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message
        for message in messages
        for text in [message.get("content")]
    ]
    for form in (messages, in_parts):  # templates of vision models take parts alone, or leave out a plain text
        try:
            options = fixed_date(tokenizer, options.get("tools")) | options
            text = tokenizer.apply_chat_template(
                form, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except ImportError as error:
            raise PtmoeError(f"chat templates need jinja2: {error}") from None
        except Exception as error:  # a template may raise anything
            refusals.append(f"refuses it: {' '.join(str(error).split())[:300] or type(error).__name__}")
            continue
        folded = "".join(text.split())  # a template may strip texts, and set reasoning in lines of its own
        if all(any("".join(form.split()) in folded for form in _forms(said)) for said in _must_be_there(messages)):
            return cast(str, text)
        refusals.append("leaves out what a message says")
    raise BadRecordError(f"the chat template {refusals[0]}")


def _must_be_there(messages: list[dict[str, Any]]) -> Iterator[str]:
    """What each message says. Of earlier answers templates leave out the reasoning, and the words beside tool calls."""
    for message in messages:
        earlier = message["role"] == "assistant" and message is not messages[-1]
        content, calls = message.get("content"), message.get("tool_calls") or []
        if isinstance(content, str) and not (earlier and calls):
            yield content.rpartition("</think>")[2] if earlier else content
        if earlier:
            yield from (str(call.get("function", call).get("name", "")) for call in calls)


def _forms(said: str) -> Iterator[str]:
    """A text, and as templates write what a tool says."""
    yield said
    yield json.dumps(said, ensure_ascii=False)[1:-1]


def fixed_date(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> dict[str, Any]:
    """Options of `apply_chat_template` with which a template writes one date instead of today's.

    Args:
        tokenizer: whose template it is.
        tools: of the conversation, for which a tokenizer may have a template of its own.
    """
    template = tokenizer.get_chat_template(None, tools)
    clock = {"chat_template": _fixed_clock() + template} if "strftime_now" in template else {}
    return {"date_string": "26 Jul 2024", **clock}


@lru_cache(maxsize=1)
def _fixed_clock() -> str:
    """A macro that takes the place of the `strftime_now` that `transformers` gives to a template."""
    values = {f"%{letter}": _TODAY.strftime(f"%{letter}") for letter in string.ascii_letters}
    known = {directive: value for directive, value in values.items() if value and not value.startswith("%")}
    known |= {f"%-{directive[1]}": value.lstrip("0") or "0" for directive, value in known.items() if value.isdigit()}
    replaced = "".join(f" | replace('{directive}', '{value}')" for directive, value in known.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def require_parts(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    answer: dict[str, Any],
    whole: str,
) -> None:
    """
    Raises:
        BadRecordError: the template leaves out the answer's reasoning or tool calls, or the tools.
    """
    ignored = []
    for names in (_REASONING, ("tool_calls",)):
        without = {key: value for key, value in answer.items() if key not in names or not value}
        if len(without) < len(answer):
            rest = render(example, tokenizer, [*messages, without], add_generation_prompt=False)
            ignored += [next(key for key in answer if key not in without)] if rest == whole else []
    if example.template.get("tools"):
        rest = render(example, tokenizer, [*messages, answer], add_generation_prompt=False, tools=False)
        ignored += ["tools"] if rest == whole else []
    if ignored:
        raise BadRecordError(
            f"the chat template leaves out {' and '.join(map(repr, ignored))}: remove it, or take a tokenizer whose "
            "template writes it"
        )


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise PtmoeError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template for data with messages: "
            "give prompt and completion instead, or omit --chat"
        )
