"""From examples to padded batches: prompt and completion are tokenised apart, so generation sees the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.loss import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.tasks.base import Example


@dataclass(frozen=True)
class Fitted:
    """Tokenised examples that fit the base's positions, and how many were cut to fit or left out."""

    rows: list[dict[str, list[int]]]
    cut: int
    left_out: int


def prompt_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the model is given: in generation all of them, in training before the completion."""
    if example.messages:
        text = _chat(tokenizer, example.messages, add_generation_prompt=True)
        return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = cast(list[int], tokenizer(example.input)["input_ids"])
    # Some tokenizers close every text with the end token: a prompt goes on.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def completion_ids(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The supervised tokens; they end with the end token, so that the model learns to stop."""
    text = example.target
    if example.messages:
        before = _chat(tokenizer, example.messages, add_generation_prompt=True)
        answer = {"role": "assistant", "content": example.target}
        whole = _chat(tokenizer, (*example.messages, answer), add_generation_prompt=False)
        if not whole.startswith(before):
            raise PtmoeError(
                "the tokenizer's chat template writes a conversation differently with and without its last answer, so "
                "the prompt in training would not be the one in generation: give prompt and completion instead"
            )
        text = whole[len(before) :]
    ids = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return ids if end is None or end in ids[-2:] else [*ids, end]


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise PtmoeError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template for data with messages: "
            "give prompt and completion instead"
        )
    return cast(
        str,
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt),
    )


def fit(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str = "left_out"
) -> Fitted:
    """Tokenise training examples into rows of at most `max_length` tokens.

    Args:
        examples: to train on.
        tokenizer: the base's.
        max_length: real tokens that a row may have: the base's positions less the virtual tokens.
        truncation: what happens to a longer one: `"left_out"`, or `"cut"`, which drops the beginning of its prompt;
            a completion is never cut.

    Raises:
        PtmoeError: none fits.
    """
    rows, cut = [], 0
    for example in examples:
        prompt, completion = prompt_ids(example, tokenizer), completion_ids(example, tokenizer)
        room = max_length - len(completion)
        if len(prompt) > room:
            if truncation != "cut" or room < 1:
                continue
            prompt, cut = prompt[-room:], cut + 1
        rows.append({"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion})
    if not rows:
        raise PtmoeError(
            f"none of the {len(examples)} examples fits {max_length} tokens (the base's positions less the virtual "
            "tokens): shorten them, or cut them with --truncation cut"
        )
    return Fitted(rows, cut, len(examples) - len(rows))


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, `(B, L)` each."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][index, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, :length] = torch.tensor(row["labels"])
    return batch
