"""Greedy completions of many prompts, the same in whatever batches they are computed.

A batch rounds differently from a row alone, depending on its shape and its padding. Where the two best tokens' scores
are closer than that, one pass over the row alone decides. This holds in float32; in half precision rounding is as large
as real differences, and a completion may depend on the batch.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ptmoe.evaluate.routing import route
from ptmoe.methods import Routing
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.decoding import Decoder
from ptmoe.tasks.metrics import END_OF_REASONING
from ptmoe.tasks.tokens import decoded

# Scores of a row alone and in a batch were never more than a tenth of this apart in float32
# (tests/evaluate/test_evaluation.py).
NEAR_TIE = 1e-3
START_OF_REASONING = "<think>"
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
        until: a completion ends before the first of these texts behind its reasoning.
        decoder: of the model, to be shared by several batches: the keys and values of a fixed prompt are kept.
    """
    decoder = decoder or Decoder(model)
    ends = end_tokens(model, tokenizer)
    think = [decoded(tokenizer, prompt[-8:]).rstrip().endswith(START_OF_REASONING) for prompt in prompts]
    routings = [route(model, prompt) for prompt in prompts]
    experts = [0 if routing is None else int(routing.gate[0].argmax()) for routing in routings]

    exact = model.dtype == torch.float32
    alone = [row for row, routing in enumerate(routings) if exact and routing is not None and nearly_tied(routing)]
    together = [row for row in range(len(prompts)) if row not in alone]
    parts = [[row for row in together if think[row] == thinks] for thinks in (False, True)]
    new: dict[int, list[int]] = {}
    for rows in [part for part in parts if part] + [[row] for row in alone]:
        ended = _end_test(tokenizer, ends, until, think[rows[0]])
        batch = [prompts[row] for row in rows], [experts[row] for row in rows]
        margin = NEAR_TIE if exact else 0.0
        made = decoder(*batch, max_new_tokens=max_new_tokens, ended=ended, margin=margin)
        new.update(zip(rows, made, strict=True))
    texts = [answer_text(tokenizer, new[row], ends) for row in range(len(prompts))]
    gates = [None if routing is None else rounded_gate(routing) for routing in routings]
    return [
        Completion(_before(text, until, thinks), gate) for text, thinks, gate in zip(texts, think, gates, strict=True)
    ]


def rounded_gate(routing: Routing) -> list[float]:
    """The gate of a row that was routed alone, as predictions record it."""
    return [round(entry, 6) for entry in routing.gate[0].tolist()]


def nearly_tied(routing: Routing) -> bool:
    """Whether another expert was nearly chosen."""
    kept = int((routing.gate[0] != 0).sum())
    probabilities = routing.probabilities[0].sort(descending=True).values.tolist()
    return 0 < kept < len(probabilities) and probabilities[kept - 1] - probabilities[kept] < NEAR_TIE_OF_EXPERTS


def _before(text: str, until: Sequence[str], thinks: bool) -> str:
    """The text before the first of `until` behind its reasoning, which `thinks` says it begins with; white space at the
    beginning of an answer does not end it by itself."""
    reasoning = text.rfind(END_OF_REASONING)
    if reasoning < 0 and (thinks or text.lstrip().startswith(START_OF_REASONING)):
        return text
    start = 0 if reasoning < 0 else reasoning + len(END_OF_REASONING)
    first = len(text) - len(text[start:].lstrip())  # of what is no white space
    places = [place for stop in until if (place := text.find(stop, max(start, first + 1 - len(stop)))) >= 0]
    return text[: min(places)] if places else text


def end_tokens(model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: those in the base's generation config, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def answer_text(tokenizer: PreTrainedTokenizerBase, new: list[int], ends: Collection[int]) -> str:
    """What new tokens say. The end token has no text, though the tokenizer may not count it as a special one."""
    return decoded(tokenizer, new[:-1] if new[-1] in ends else new, special=False)


def _end_test(
    tokenizer: PreTrainedTokenizerBase, ends: set[int], until: Sequence[str], thinks: bool
) -> Callable[[list[int]], bool]:
    """Whether a row of new tokens has ended: with an end token, or with one of the texts `until`."""
    window = max(map(len, until), default=0) + 8  # tokens; each is at least a byte, so the text is within

    def ended(row: list[int]) -> bool:
        if row[-1] in ends:
            return True
        recent = decoded(tokenizer, row[-window:], special=False) if until else ""
        if not any(stop in recent for stop in until):
            return False
        whole = decoded(tokenizer, row, special=False)
        return _before(whole, until, thinks) != whole

    return ended
