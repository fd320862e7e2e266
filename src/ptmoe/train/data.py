"""From examples to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.fast.loss import IGNORED
from ptmoe.tasks.tokens import Prompt, encode_completion, encode_prompt
from ptmoe.train.rows import Encoded, TokenCache, TokenRows, settings_of, token_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example


@dataclass(frozen=True)
class Fitted:
    """Tokenised examples that fit the base's positions, and the numbers of those that were cut or left out."""

    rows: TokenRows
    cut: int
    left_out: int


def fit(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "left_out",
    *,
    chat: bool = False,
    cache: bool = False,
    say: Callable[[str], None] = print,
) -> Fitted:
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
        say: gets a line of text if they cannot be cached.

    Raises:
        PtmoeError: no example fits.
    """
    options: dict[str, Any] = {"max_length": max_length, "truncation": truncation, "chat": chat}
    encode = partial(_encode, tokenizer=tokenizer, **options)
    kept = TokenCache(lambda: settings_of(tokenizer, _encode, options), say) if cache else None
    blocks = token_blocks(examples, encode, kept)
    rows = TokenRows(blocks)
    cut, left_out = sum(block.cut for block in blocks), sum(block.left_out for block in blocks)
    if not len(rows):
        raise PtmoeError(
            f"none of the {left_out} examples fits {max_length} tokens (--max-length, or the base's positions minus "
            "the virtual tokens): shorten them, or cut them with --truncation cut"
        )
    return Fitted(rows, cut, left_out)


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
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"])
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, :length] = torch.as_tensor(row["labels"])
    return batch
