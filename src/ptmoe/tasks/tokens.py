"""From an example to tokens: prompt and completion are tokenised separately, so that the prompt in generation is the
prompt in training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ptmoe.errors import PtmoeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example, Task

# Some templates (Llama 3's) write today's date into every conversation, so that a prompt would differ from one day to
# the next. This is the default date in Llama 3.2's template.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt.

    Attributes:
        ids: in generation all input tokens, in training those before the completion.
        cut: how many tokens of the context were cut at its beginning and at its end to make the prompt fit.
        context: the span of the remaining context in `ids`, where it was cut.
    """

    ids: list[int]
    cut: tuple[int, int] = (0, 0)
    context: tuple[int, int] = (0, 0)

    @property
    def is_cut(self) -> bool:
        return self.cut != (0, 0)


def uses_chat(task: Task, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts are put in the tokenizer's chat template: as asked, else if the task uses it and there is one.

    Raises:
        PtmoeError: it was asked for, and there is none.
    """
    if chat:
        _require_template(tokenizer)
    return bool(tokenizer.chat_template) and task.chat if chat is None else chat


def encode_prompt(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool = False,
    room: int | None = None,
    around_answer: bool = False,
) -> Prompt | None:
    """An example's prompt, in at most `room` tokens.

    Only the context is ever cut, never the question: from its end, since in use nobody knows where the answer is, or in
    training `around_answer`, so that the example still contains it.

    Args:
        example: a conversation if it has `messages`; else its `input` is plain text, or with `chat` the user's message.
        tokenizer: the base's.
        chat: put the input in the tokenizer's chat template.
        room: the maximum number of tokens; None for no limit.
        around_answer: keep the answer in the middle of the remaining context.

    Returns:
        None if the prompt does not fit even without its context.
    """
    chat = chat or bool(example.messages)
    text = _chat(tokenizer, _messages(example), add_generation_prompt=True) if chat else example.input
    ids = cast(list[int], tokenizer(text, add_special_tokens=not chat)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # added by some tokenizers; but a prompt is to be continued
        ids = ids[:-1]
    if room is None or len(ids) <= room:
        return Prompt(ids)
    start, end = example.context
    if start == end:
        return None
    shift = text.find(example.input[start:end]) - start
    if shift + start < 0:
        return None  # the template rewrites the text
    if not tokenizer.is_fast:
        raise PtmoeError(
            f"example {example.id} has {len(ids)} tokens, {room} fit, and {type(tokenizer).__name__} cannot say which "
            "of them are the context's: use a fast tokenizer, or a base with more positions"
        )
    offsets = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
    inside = [i for i, (a, b) in enumerate(offsets) if shift + start <= a < b <= shift + end]
    excess = len(ids) - room
    if not inside or excess > len(inside):
        return None
    first, last = inside[0], inside[-1] + 1  # the context's tokens
    begin, kept = first, last - first - excess
    if around_answer and example.answer is not None:
        where = [shift + edge for edge in example.answer]
        answer = [i for i in inside if offsets[i][1] > where[0] and offsets[i][0] < where[1]]
        if answer:
            middle = answer[0] - max(0, kept - len(answer)) // 2
            begin = min(max(first, middle), last - kept)
    # A character of several tokens is cut as a whole.
    while kept and begin > first and offsets[begin] == offsets[begin - 1]:
        begin, kept = begin + 1, kept - 1
    while kept and begin + kept < last and offsets[begin + kept] == offsets[begin + kept - 1]:
        kept -= 1
    end_of_kept = begin + kept
    return Prompt(
        ids[:first] + ids[begin:end_of_kept] + ids[last:],
        cut=(begin - first, last - end_of_kept),
        context=(first, first + kept),
    )


def encode_completion(example: Example, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> list[int]:
    """The supervised tokens, closed by the end token, so that the model learns to stop."""
    text = example.target
    if example.messages or chat:
        messages = _messages(example)
        before = _chat(tokenizer, messages, add_generation_prompt=True)
        answer = {"role": "assistant", "content": text if example.messages else text.strip()}
        whole = _chat(tokenizer, [*messages, answer], add_generation_prompt=False)
        if not whole.startswith(before):
            raise PtmoeError(
                "the tokenizer's chat template writes a conversation differently with and without its last answer, so "
                "the prompt in training would not be the one in generation: give prompt and completion instead, or "
                "train with --no-chat"
            )
        text = whole[len(before) :]
    ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or end in ids[-2:] else [*ids, end]


def _messages(example: Example) -> list[dict[str, Any]]:
    """The messages before the answer."""
    return list(example.messages) or [{"role": "user", "content": example.input}]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    _require_template(tokenizer)
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, date_string=_DATE
    )
    return cast(str, text)


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise PtmoeError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template for data with messages: "
            "give prompt and completion instead, or omit --chat"
        )
