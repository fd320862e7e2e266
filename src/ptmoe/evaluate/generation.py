"""Greedy completions of many prompts, the same in whatever batches they are computed.

A batch rounds otherwise than a row alone, by its shape and its padding, and a token whose score is within that rounding
of the next one's could be either. Then one pass over the row alone decides. This holds in float32; in half precision
rounding is as large as real differences, and a completion may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from ptmoe.models.decoding import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.methods import Routing
    from ptmoe.models.causal import PromptedCausalLM

# Scores of a row alone and in a batch were never more than a tenth of this apart in float32 (tests/test_evaluate.py).
NEAR_TIE = 1e-3
NEAR_TIE_OF_EXPERTS = 1e-4  # of two probabilities


@dataclass(frozen=True)
class Completion:
    """A completed prompt; `gate` is None for a method that does not route."""

    text: str
    gate: list[float] | None


@torch.no_grad()
def complete(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    decoder: Decoder | None = None,
) -> list[Completion]:
    """Greedy completions of a batch of prompts.

    Args:
        model: in evaluation mode, with its active adapter.
        tokenizer: the base's.
        prompts: token ids, at least one each.
        max_new_tokens: of each completion.
        until: a completion ends before the first of these texts.
        decoder: of the model, if there are several batches: what it has computed for one serves the others.
    """
    decoder = decoder or Decoder(model)
    ends = _Ends(model, tokenizer, until)
    routings = [_route(model, prompt) for prompt in prompts]
    experts = [0 if one is None else int(one.gate[0].argmax()) for one in routings]

    exact = model.dtype == torch.float32
    apart = [row for row, one in enumerate(routings) if exact and one is not None and _experts_nearly_tie(one)]
    together = [row for row in range(len(prompts)) if row not in apart]
    made: dict[int, list[int]] = {}
    for rows in ([together] if together else []) + [[row] for row in apart]:
        chosen = [prompts[row] for row in rows], [experts[row] for row in rows]
        margin = NEAR_TIE if exact else 0.0
        made.update(zip(rows, decoder(*chosen, max_new_tokens=max_new_tokens, ended=ends, margin=margin), strict=True))
    texts = tokenizer.batch_decode([made[row] for row in range(len(prompts))], skip_special_tokens=True)
    return [
        Completion(_before(text, until), None if one is None else [round(value, 6) for value in one.gate[0].tolist()])
        for text, one in zip(texts, routings, strict=True)
    ]


def _route(model: PromptedCausalLM, prompt: list[int]) -> Routing | None:
    """Of a row alone: the same bits in every batch."""
    return model.route(torch.tensor([prompt], device=model.device)) if model.num_virtual_tokens else None


def _experts_nearly_tie(routing: Routing) -> bool:
    """Whether another expert was nearly kept."""
    kept = int((routing.gate[0] != 0).sum())
    probabilities = routing.probabilities[0].sort(descending=True).values.tolist()
    return 0 < kept < len(probabilities) and probabilities[kept - 1] - probabilities[kept] < NEAR_TIE_OF_EXPERTS


def _before(text: str, until: Sequence[str]) -> str:
    """What comes before the first of `until`; white space that a completion begins with does not end it."""
    start = len(text) - len(text.lstrip())
    places = [place for stop in until if (place := text.find(stop, start)) >= 0]
    return text[: min(places)] if places else text


def end_tokens(model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: those in the base's generation config, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


class _Ends:
    """Whether a row of new tokens has ended: with an end token, or with a text after which nothing counts.

    Args:
        model: whose generation config names end tokens.
        tokenizer: which has one of its own.
        until: the texts.
    """

    def __init__(self, model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase, until: Sequence[str]) -> None:
        self.tokens = end_tokens(model, tokenizer)
        self.tokenizer = tokenizer
        self.until = until
        self.window = max(map(len, until), default=0) + 8  # tokens; each is at least a byte, so the text is within

    def __call__(self, row: list[int]) -> bool:
        if row[-1] in self.tokens:
            return True
        if not self.until:
            return False
        last = self._text(row[-self.window :])
        if not any(stop in last for stop in self.until):
            return False
        whole = self._text(row)
        return _before(whole, self.until) != whole

    def _text(self, row: list[int]) -> str:
        return cast(str, self.tokenizer.decode(row, skip_special_tokens=True))
