"""From examples to padded batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ptmoe.errors import PtmoeError
from ptmoe.fast.loss import IGNORED
from ptmoe.tasks.base import Example
from ptmoe.tasks.problems import Problems
from ptmoe.tasks.tokens import Prompt, TextCheck, encode_completion, encode_prompt
from ptmoe.train.rows import Encoded, TokenRows, settings_hash, token_rows


def fit(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "left_out",
    *,
    chat: bool = False,
    cache: bool = False,
    problems: Problems | None = None,
    say: Callable[[str], None] = print,
) -> TokenRows:
    """Tokenise training examples into rows of at most `max_length` tokens; the texts are not kept.

    A context (`Example.context`) that is too long is cut around the answer. A completion is never cut.

    Args:
        examples: the training examples.
        tokenizer: the base's.
        max_length: the most real tokens of a row: at most the base's positions minus the virtual tokens.
        truncation: what happens to an example that is too long and has no context: `"left_out"`, or `"cut"`, which
            drops the beginning of its prompt.
        chat: put prompts in the tokenizer's chat template.
        cache: cache the tokens of large data in files, and read them from there (`ptmoe.train.rows`).
        problems: gets the examples that the chat template refuses; by default they are refused here.
        say: gets a line of text if they cannot be cached, and if the tokenizer does not keep every text or has no end
            token.

    Raises:
        PtmoeError: no example fits, or one cannot be tokenised.
    """
    problems = problems if problems is not None else Problems(at_once=True)
    if tokenizer.eos_token_id is None:
        say("the tokenizer has no end token, so the model does not learn to stop: set its eos_token and save it again")

    def watched() -> Iterator[Example]:
        check = TextCheck(tokenizer, chat=chat)
        for example in examples:
            if change := check.look(example):
                say(change)
            yield example

    options: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "chat": chat}
    settings = partial(settings_hash, tokenizer, _encode, options) if cache else None
    encode = partial(_encode, tokenizer=tokenizer, **options)
    rows = token_rows(watched(), encode, settings, problems, say)
    problems.refuse()
    if not len(rows) and not rows.left_out:
        raise PtmoeError(f"no example is left: {problems.listed()}")
    if not len(rows):
        raise PtmoeError(
            f"none of the {rows.left_out} examples fits {max_length} tokens (--max-length, or the base's positions "
            "minus the virtual tokens): shorten them, or cut them with --truncation cut"
        )
    return rows


def _encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str, chat: bool
) -> Encoded | None:
    """An example's prompt and completion in at most `max_length` tokens, or None if they do not fit."""
    completion = encode_completion(example, tokenizer, chat=chat)
    room = max_length - len(completion)
    prompt = encode_prompt(example, tokenizer, chat=chat, room=room, around_answer=True)
    if prompt is None and truncation == "cut" and room > 0 and example.context == (0, 0):
        whole = encode_prompt(example, tokenizer, chat=chat)
        assert whole is not None
        prompt = Prompt(whole.ids[-room:], cut=(len(whole.ids) - room, 0))
    return None if prompt is None else (prompt, completion)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, `(B, L)` each."""
    ids, labels = ([torch.as_tensor(row[key], dtype=torch.long) for row in rows] for key in ("input_ids", "labels"))
    pad = partial(pad_sequence, batch_first=True)
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(row) for row in ids]),
        "labels": pad(labels, padding_value=IGNORED),
    }
