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
from ptmoe.evaluate.generation import complete
from ptmoe.models.attach import attach
from ptmoe.models.decoding import Decoder
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


def ptmoe(setting: Setting, method: dict[str, Any], ends: bool, **work: Any) -> Round:
    """The prompts sorted by length, as `ptmoe eval` sorts them."""
    model = attach(_base(setting, ends), method_config(method), check=not ends).eval()  # a count-down is not causal
    tokenizer = Ids(ends)

    def start() -> Answers:
        decoder = Decoder(model)  # for all batches of an evaluation; it reads a fixed prompt

        def answers(batch: list[list[int]], new_tokens: int) -> list[str]:
            made = complete(model, tokenizer, batch, max_new_tokens=new_tokens, decoder=decoder)  # type: ignore[arg-type]
            return [completion.text for completion in made]

        return answers

    return _measured(setting, start, by_length=True, **work)


def peft(setting: Setting, ends: bool, virtual: int, by_length: bool, **work: Any) -> Round:
    """The prompts as they come, or sorted."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    model = get_peft_model(_base(setting, ends), config).eval()
    tokenizer = Ids(ends)

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

    return _measured(setting, lambda: answers, by_length=by_length, virtual=virtual, **work)


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
    lengths: Lengths,
    virtual: int,
    places: int,
    new_tokens: int,
    by_length: bool,
) -> Round:
    @torch.no_grad()
    def measure(brief: bool) -> dict[str, Any]:
        recorded = rows([SHORT] * 8 if brief else lengths, setting.vocabulary)
        prompts = [[*prompt[:-1], END + len(answer)] for prompt, answer in recorded]
        parts = batches(prompts, places, virtual + new_tokens, by_length)
        made: list[str] = []

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


def _base(setting: Setting, ends: bool) -> PreTrainedModel:
    """The base with logits as far apart as a trained model's, so that the best two tokens nearly tie as rarely: random
    weights put them ten times as close, and `complete` looks at a row with a near tie alone."""
    base = setting.base()
    with torch.no_grad():
        base.model.norm.weight.mul_(SPREAD / (base.config.initializer_range * base.config.hidden_size**0.5))
    if ends:
        _CountDown(base)
    return base


class _CountDown:
    """Ends every answer where the recorded one ends, on all sides alike: a row's last token says how many are to come,
    and the next number, down to the end token, takes the best score in exchange. So scores are as far apart as ever."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.last = torch.empty(0)
        base.get_input_embeddings().register_forward_hook(self.read)
        base.get_output_embeddings().register_forward_hook(self.write)

    def read(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        self.last = inputs[0].reshape(-1, inputs[0].shape[-1])[:, -1]

    def write(self, _: nn.Module, __: Any, logits: Tensor) -> None:
        scores = logits[:, -1]  # (B, V)
        if len(scores) == len(self.last):  # not where a prompt is read without tokens
            best, token = scores.max(1, keepdim=True)
            wanted = (self.last[:, None] - 1).clamp(min=END)
            scores.scatter_(1, token, scores.gather(1, wanted)).scatter_(1, wanted, best)
