"""Greedy completions of many prompts: `ptmoe.evaluate.generation.complete` and peft's `generate`, in batches that hold
the same number of tokens at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.lengths import Lengths, rows
from benchmarks.machine import Setting, device, seconds
from benchmarks.parts.step import SHORT
from benchmarks.worker import Round
from ptmoe.evaluate.decoding import Decoder
from ptmoe.evaluate.generation import complete
from ptmoe.model import attach
from ptmoe.train.options import method_config

Answers = Callable[[list[list[int]], int], list[str]]  # to prompts, of so many new tokens
PAD, END = 0, 1
SPREAD = 4.5  # standard deviation of the logits


class Ids:
    """In the place of a tokenizer: texts are numbers. Turning tokens into text is measured on no side."""

    pad_token_id = PAD

    def __init__(self, ends: bool) -> None:
        self.eos_token_id = END if ends else None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(str(token) for token in ids if token not in (PAD, END))

    def batch_decode(self, batch: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self.decode(ids) for ids in batch]


def ptmoe(setting: Setting, method: dict[str, Any], ending: float, **work: Any) -> Round:
    """The prompts sorted by length, as `ptmoe eval` sorts them."""
    base, ends = _base(setting, ending)
    model = attach(base, method_config(method)).eval()
    tokenizer = Ids(ends=ending > 0)

    def start() -> Answers:
        decoder = Decoder(model)  # for all batches of an evaluation; it reads a fixed prompt

        def answers(batch: list[list[int]], new_tokens: int) -> list[str]:
            made = complete(model, tokenizer, batch, max_new_tokens=new_tokens, decoder=decoder)  # type: ignore[arg-type]
            return [completion.text for completion in made]

        return answers

    return _measured(setting, start, ends, by_length=True, **work)


def peft(setting: Setting, ending: float, virtual: int, by_length: bool, **work: Any) -> Round:
    """The prompts as they come, or sorted."""
    base, ends = _base(setting, ending)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    model = get_peft_model(base, config).eval()
    tokenizer = Ids(ends=ending > 0)

    def answers(batch: list[list[int]], new_tokens: int) -> list[str]:
        longest = max(map(len, batch))
        made = model.generate(
            input_ids=torch.tensor([[PAD] * (longest - len(row)) + row for row in batch], device=device()),
            attention_mask=torch.tensor(
                [[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device()
            ),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=PAD,
        )
        return tokenizer.batch_decode(made[:, longest:].tolist())

    return _measured(setting, lambda: answers, ends, by_length=by_length, virtual=virtual, **work)


def batches(prompts: list[list[int]], places: int, beside: int, by_length: bool) -> list[list[list[int]]]:
    """Each as large as `places` allows, which a row takes as many of as the longest prompt has tokens, and `beside`."""
    made: list[list[list[int]]] = []
    longest = 0
    for prompt in sorted(prompts, key=len, reverse=True) if by_length else prompts:
        longest = max(longest, len(prompt))
        if not made or (len(made[-1]) + 1) * (longest + beside) > places:
            made.append([])
            longest = len(prompt)
        made[-1].append(prompt)
    return made


def _measured(
    setting: Setting,
    start: Callable[[], Answers],
    ends: _Ending,
    lengths: Lengths,
    virtual: int,
    places: int,
    new_tokens: int,
    by_length: bool,
) -> Round:
    @torch.no_grad()
    def measure(brief: bool) -> dict[str, Any]:
        prompts = [prompt for prompt, _ in rows([SHORT] * 8 if brief else lengths, setting.vocabulary)]
        parts = batches(prompts, places, virtual + new_tokens, by_length)
        made: list[str] = []
        ends.draw += 0.37  # other ends in every round

        def run() -> None:
            answers = start()
            for batch in parts:
                made.extend(answers(batch, 2 if brief else new_tokens))

        return {
            "seconds": seconds(run),
            "batches": len(parts),
            "new_tokens": sum(len(text.split()) for text in made),
        }

    return measure


def _base(setting: Setting, ending: float) -> tuple[PreTrainedModel, _Ending]:
    """The base with logits as far apart as a trained model's, so that the best two tokens nearly tie as rarely: random
    weights put them ten times as close, and `complete` would compute half of the rows twice."""
    base = setting.base()
    with torch.no_grad():
        base.model.norm.weight.mul_(SPREAD / (base.config.initializer_range * base.config.hidden_size**0.5))
    ends = _Ending(ending)
    if ending:
        base.get_output_embeddings().register_forward_hook(ends)
    return base, ends


class _Ending:
    """Puts the end token first with a given probability and never else, wherever a row stands in its batch. The sum of
    its hidden state, in the hundreds, decides: its part after the point is as good as chance. `draw` makes it another.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability
        self.draw = 0.0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        chance = (inputs[0].float().sum(-1) + self.draw).remainder(1.0)  # (B, L)
        logits[..., END] = torch.where(chance < self.probability, torch.inf, -torch.inf).to(logits.dtype)
        return logits
