"""Greedy completions of many prompts, the same in whatever batches they are computed.

A batch rounds otherwise than a row alone, by its shape and its padding, and a token whose score is within that rounding
of the next one's could be either. Such a row is completed once more, alone, and that is its completion. This holds in
float32; in half precision rounding is as large as real differences, and a completion may depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.methods import Routing
    from ptmoe.model import PromptedCausalLM

# Scores of a row alone and in a batch were never more than a tenth of this apart in float32 (tests/test_evaluate.py).
NEAR_TIE = 1e-3
NEAR_TIE_OF_EXPERTS = 1e-4  # of two probabilities
# Greedy whatever the base's own generation config asks for: some ship a repetition penalty.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "renormalize_logits": False,
}


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
) -> list[Completion]:
    """Greedy completions of a batch of prompts.

    Args:
        model: in evaluation mode, with its active adapter.
        tokenizer: the base's.
        prompts: token ids, at least one each.
        max_new_tokens: of each completion.
        until: a completion ends before the first of these texts.
    """
    routings = [_route(model, prompt) for prompt in prompts]
    rows, unsure = _generate(model, tokenizer, prompts, max_new_tokens, until)
    if len(prompts) > 1 and model.dtype == torch.float32:
        for index, routing in enumerate(routings):
            if unsure[index] or (routing is not None and _experts_nearly_tie(routing)):
                rows[index] = _generate(model, tokenizer, [prompts[index]], max_new_tokens, until)[0][0]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
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


def _generate(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    until: Sequence[str],
) -> tuple[list[list[int]], list[bool]]:
    """Each row's new tokens, and whether any of them was nearly another."""
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    margins = _Margins(longest, ends)
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        logits_processor=[margins],
        stopping_criteria=[_Until(tokenizer, longest, until)] if until else [],
        **GREEDY,
    )
    return made[:, longest:].tolist(), margins.near_tie()


def _end_tokens(model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return [token for token in dict.fromkeys([*listed, tokenizer.eos_token_id]) if token is not None]


def _before(text: str, until: Sequence[str]) -> str:
    """What comes before the first of `until`; white space that a completion begins with does not end it."""
    start = len(text) - len(text.lstrip())
    places = [place for stop in until if (place := text.find(stop, start)) >= 0]
    return text[: min(places)] if places else text


class _Margins(LogitsProcessor):
    """Watches how far each row's best token is ahead of the next, until the row has ended."""

    def __init__(self, length: int, ends: list[int]) -> None:
        self.length = length
        self.ends = ends
        self.least: Tensor | None = None  # (B,)
        self.ended: Tensor | None = None  # (B,)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float().topk(min(2, scores.shape[1]), dim=1).values
        margin = best[:, 0] - best[:, -1]
        if self.least is None or self.ended is None:
            self.least, self.ended = margin, torch.zeros_like(margin, dtype=torch.bool)
            return scores
        for end in self.ends:
            self.ended = self.ended | (input_ids[:, -1] == end)
        self.least = torch.where(self.ended, self.least, torch.minimum(self.least, margin))
        return scores

    def near_tie(self) -> list[bool]:
        assert self.least is not None
        return (~(self.least >= NEAR_TIE)).tolist()  # a NaN is unsure, too


class _Until(StoppingCriteria):
    """Ends a row where its text holds one of the given ones: no later step can change what stands before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, until: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.until = until
        self.window = max(map(len, until)) + 8  # tokens; each is at least a byte, so the text is within
        self.ended: list[bool] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if self.ended is None:
            self.ended = [False] * len(input_ids)
        new = input_ids[:, self.length :]
        for index, text in enumerate(self.tokenizer.batch_decode(new[:, -self.window :], skip_special_tokens=True)):
            if not self.ended[index] and any(stop in text for stop in self.until):
                whole = self.tokenizer.decode(new[index], skip_special_tokens=True)
                self.ended[index] = _before(whole, self.until) != whole
        return torch.tensor(self.ended, device=input_ids.device)
