r"""From an example to tokens: prompt and completion are tokenised separately, so that the prompt in generation is the
prompt in training.

Both are the user's text, no more and no less:

- A prompt gets what the tokenizer puts before a text (a beginning-of-text token), unless it begins with that already,
  and nothing that the tokenizer puts behind one. An end token that the prompt itself holds stays.
- A completion continues the prompt: some tokenizers put a space before every text, which would stand between the two.
- A conversation is what the chat template writes (`ptmoe.tasks.chat`). Where a prompt and a completion become one, the
  space between the two, which belongs to neither, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from ptmoe.errors import PtmoeError, without_embedding
from ptmoe.tasks.chat import render, require_template, respaced
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.records import check_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example, Task

_PROBE = "a"
CHECKED = 100  # the first examples, which are compared with what their tokens say


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt."""

    ids: list[int]  # in generation all input tokens, in training those before the completion
    cut: tuple[int, int] = (0, 0)  # tokens of the context cut at its beginning and its end, to make the prompt fit
    context: tuple[int, int] = (0, 0)  # the span of the remaining context in `ids`, where it was cut

    @property
    def is_cut(self) -> bool:
        return self.cut != (0, 0)


def uses_chat(task: Task, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts are put in the tokenizer's chat template: as asked, else if the task uses it and there is one.

    Raises:
        PtmoeError: it was asked for, and there is none.
    """
    if chat:
        require_template(tokenizer)
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

    Raises:
        BadRecordError: the chat template refuses the conversation, or the text is no Unicode.
    """
    text = prompt_text(example, tokenizer, chat=chat)
    begin_of_text = [] if chat or example.messages else _habits(tokenizer)[0]
    ids = _ids(tokenizer, text)
    if ids[: len(begin_of_text)] == begin_of_text:
        begin_of_text = []
    ids = begin_of_text + ids
    if room is None or len(ids) <= room:
        return Prompt(ids)
    _, end = example.context
    passage = example.input[slice(*example.context)].lstrip()  # a template may strip the text
    start = end - len(passage)
    if start == end:
        return None
    shift = text.find(passage) - start
    if shift + start < 0:
        return None  # the template rewrites the text
    if not tokenizer.is_fast:
        raise PtmoeError(
            f"example {example.id} has {len(ids)} tokens, {room} fit, and {type(tokenizer).__name__} cannot say which "
            "of them are the context's: use a fast tokenizer, or a base with more positions"
        )
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    offsets = [(0, 0)] * len(begin_of_text) + offsets
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


def encode_prompts(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Iterator[tuple[Example, Prompt | None]]:
    """Each example with its prompt; `options` as of `encode_prompt`.

    Raises:
        PtmoeError: a prompt cannot be made; the message says where its example stands.
    """
    problems = Problems(at_once=True)
    for example in examples:
        with problems.at(example.where):
            prompt = encode_prompt(example, tokenizer, **options)
        yield example, prompt


def encode_completion(example: Example, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> list[int]:
    """The supervised tokens, closed by the end token, so that the model learns to stop.

    Raises:
        BadRecordError: the chat template refuses the conversation or leaves a part of it out, or the text is no
            Unicode.
    """
    ids = _continuation(tokenizer, completion_text(example, tokenizer, chat=chat))
    end = tokenizer.eos_token_id
    closed = ids[-1:] == [end] or (ids[-2:-1] == [end] and decoded(tokenizer, ids[-1:]).isspace())  # as templates close
    return ids if end is None or closed else [*ids, end]


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> str:
    """The text of a prompt, in the chat template for a conversation and with `chat`.

    Raises:
        BadRecordError: the chat template refuses it or leaves a part of it out, or there is something for the template,
            and none is used.
    """
    if not (example.messages or chat):
        if example.template:
            raise BadRecordError(
                f"{' and '.join(map(repr, example.template))} would reach the model in a chat template alone: put the "
                "prompt into one with --chat, or remove it"
            )
        return example.input
    return render(example, tokenizer, _messages(example), add_generation_prompt=True)


def completion_text(example: Example, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> str:
    """The text that follows the prompt's."""
    if not (example.messages or chat):
        return example.target
    whole = render(example, tokenizer, [*_messages(example), _answer(example)], add_generation_prompt=False)
    before = prompt_text(example, tokenizer, chat=chat)
    if not whole.startswith(before):
        raise BadRecordError(
            "the tokenizer's chat template writes a conversation differently with and without its last answer, so "
            "the prompt in training would not be the one in generation: give prompt and completion instead, or "
            "train with --no-chat"
        )
    return whole[len(before) :]


def usable(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, problems: Problems, *, chat: bool = False
) -> list[Example]:
    """The examples whose prompts can be made; the others are added to `problems`.

    Raises:
        PtmoeError: there are others, and they are not skipped; or none is left.
    """
    kept, rows = [], vars(tokenizer).get("embedded_tokens")
    tokens_without_embedding = rows is not None and rows < len(tokenizer)  # else there is nothing to tokenise them for
    for example in examples:
        with problems.at(example.where):
            text = check_unicode(prompt_text(example, tokenizer, chat=chat))
            if tokens_without_embedding:
                _ids(tokenizer, text)
            kept.append(example)
    problems.refuse()
    if examples and not kept:
        raise PtmoeError(f"no example is left: {problems.listed()}")
    return kept


class TextCheck:
    """Looks for a text that the chat template or the tokenizer does not keep, until one is found: in the first
    `CHECKED` examples, and in each later one that has a character which none before it had."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.number, self.characters, self.found = 0, set[str](), False

    def look(self, example: Example) -> str:
        """What becomes of the first such text, in words; "" for all other examples. A space before the whole text does
        not count."""
        if self.found:
            return ""
        said = [one.get("content") for one in [*_messages(example), _answer(example)]]
        contents = [text for text in said if isinstance(text, str)]
        self.number += 1
        if self.number > CHECKED and all(map(self.characters.issuperset, contents)):
            return ""
        self.characters.update(*contents)
        change = self._change(example, contents)
        self.found = bool(change)
        return change

    def _change(self, example: Example, contents: list[str]) -> str:
        tokenizer, chat = self.tokenizer, self.chat
        try:
            texts = prompt_text(example, tokenizer, chat=chat), completion_text(example, tokenizer, chat=chat)
            in_template = example.messages or chat
            change = respaced(example, tokenizer, [*_messages(example), _answer(example)]) if in_template else None
            ids = _ids(tokenizer, texts[0]), _continuation(tokenizer, texts[1])
        except BadRecordError:  # reported where it is tokenised
            return ""
        marks = [mark for mark in tokenizer.all_special_tokens if any(mark in text for text in contents)]
        if in_template and marks:
            return (
                f"a text holds {', '.join(map(repr, marks))} ({example.where}), as the chat template writes: if it is "
                "in a template already, leave the template out with --no-chat"
            )
        if change is not None:
            return _change("chat template", *change, example)
        wanted, got = "".join(texts), decoded(tokenizer, ids[0] + ids[1])
        return "" if wanted in (got, f" {got}", got.removeprefix(" ")) else _change("tokenizer", wanted, got, example)


def _change(who: str, wanted: str, got: str, example: Example) -> str:
    pairs = zip(wanted + "\0", got + "\0", strict=False)
    start = max(0, next(i for i, (one, other) in enumerate(pairs) if one != other) - 15)
    return (
        f"the {who} changes texts: {wanted[start : start + 40]!r} becomes {got[start : start + 40]!r} "
        f"({example.where}); `ptmoe tasks show … --tokens` shows what the model reads"
    )


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token in quotes, with its spaces; a special token in ‹› instead."""
    probe = _ids(tokenizer, _PROBE)
    before, special = decoded(tokenizer, probe), set(tokenizer.all_special_ids)
    shown = []
    for token in ids:
        text = decoded(tokenizer, [*probe, token]).removeprefix(before)
        name = str(tokenizer.convert_ids_to_tokens(token))
        shown.append(f"‹{name}›" if token in special else repr(name if "\ufffd" in text or not text else text))
    return shown


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = True) -> str:
    """What tokens say, with or without special tokens, and with all spaces: some tokenizers would remove those before
    punctuation."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def row_length(positions: int | None, num_virtual_tokens: int, max_length: int | None = None) -> int:
    """How many real tokens a row may have, at most `max_length`, beside its virtual ones; `positions` are the base's,
    None if it has no limit.

    Raises:
        PtmoeError: the virtual tokens leave no room.
    """
    left = (positions or 2**31) - num_virtual_tokens
    if left < 2:
        raise PtmoeError(
            f"{num_virtual_tokens:,} virtual tokens leave no room for a text: the base has {positions:,} positions; "
            "lower --num-virtual-tokens"
        )
    return min(left, max_length or left)


def answer_limits(
    positions: int | None, num_virtual_tokens: int, usual: int, asked: int | None = None, max_length: int | None = None
) -> tuple[int, int | None]:
    """How many tokens an answer may have, as `asked` or else the `usual` number, and how many real ones its prompt.

    Raises:
        PtmoeError: a limit below 1, or an answer that leaves no room for a prompt.
    """
    for name, limit in (("max_new_tokens", asked), ("max_length", max_length)):
        if limit is not None and limit < 1:
            raise PtmoeError(f"{name}={limit}: needs at least 1")
    if positions is None:
        return asked or usual, max_length
    left = row_length(positions, num_virtual_tokens)
    new = asked or min(usual, left // 2)
    if new >= left:
        raise PtmoeError(
            f"max_new_tokens={new} leaves no room for a prompt: the base has {positions} positions and "
            f"{num_virtual_tokens} virtual tokens"
        )
    return new, left - new if max_length is None else min(max_length, left - new)


def _messages(example: Example) -> list[dict[str, Any]]:
    """The messages before the answer."""
    return list(example.messages) or [{"role": "user", "content": example.input}]


def _answer(example: Example) -> dict[str, Any]:
    """The message of the answer. Only a plain prompt needs a space between itself and the completion."""
    space = not example.messages and example.target[:1] == " " and not example.target[1:2].isspace()
    return {"role": "assistant", "content": example.target[space:], **example.reply}


# ---- the tokenizer's habits ------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of the text alone.

    Raises:
        BadRecordError: the text is no Unicode, or has a token that the base has no embedding of.
    """
    ids = cast(list[int], tokenizer(check_unicode(text), add_special_tokens=False)["input_ids"])
    rows = vars(tokenizer).get("embedded_tokens")
    if rows is not None and (token := max(ids, default=0)) >= rows:
        raise BadRecordError(f"{tokenizer.convert_ids_to_tokens(token)!r}: {without_embedding(token, rows)}")
    return ids


def _habits(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """What a tokenizer puts before a text, and the texts behind which it puts no space of its own, with their tokens;
    `""` if it never does. None of them serves a tokenizer that does not keep white space."""
    return _habits_of(tokenizer, tuple(tokenizer(_PROBE)["input_ids"]), tokenizer.eos_token)  # which may be set anew


@lru_cache(maxsize=16)
def _habits_of(
    tokenizer: PreTrainedTokenizerBase, probed: tuple[int, ...], eos_token: str | None
) -> tuple[list[int], list[tuple[str, list[int]]]]:
    bare, whole = _ids(tokenizer, _PROBE), list(probed)
    starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
    leads = []
    for lead in ("", eos_token or "", "\n", _PROBE):
        ids = _ids(tokenizer, lead)
        kept = True
        for probe in ("5", " 5", "a", " a", "\n"):
            behind = _behind(tokenizer, lead, ids, probe)
            kept &= behind is not None and decoded(tokenizer, bare + behind) == decoded(tokenizer, bare) + probe
        leads += [(lead, ids)] if kept else []
    return whole[: next(starts, 0)], leads


def _behind(tokenizer: PreTrainedTokenizerBase, lead: str, lead_ids: list[int], text: str) -> list[int] | None:
    """The tokens of `text` behind `lead`; None if the two share a token."""
    ids = _ids(tokenizer, lead + text)
    return ids[len(lead_ids) :] if ids[: len(lead_ids)] == lead_ids else None


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that continues another one."""
    made = (_behind(tokenizer, lead, ids, text) for lead, ids in _habits(tokenizer)[1])
    return next((ids for ids in made if ids is not None), None) or _ids(tokenizer, text)
