"""One training step, and the least that it could take."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from benchmarks.lengths import Lengths, rows
from benchmarks.machine import Setting, device, seconds
from benchmarks.worker import Round
from ptmoe.fast.compiled import compile_layers
from ptmoe.models.attach import attach
from ptmoe.train.data import collate
from ptmoe.train.options import method_config

SHORT = [16, 2]  # a row of a brief round


def training_rows(lengths: Lengths, vocabulary: int) -> list[dict[str, list[int]]]:
    """Rows as `ptmoe.train` has them: the answer is supervised."""
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in rows(lengths, vocabulary)
    ]


def training(setting: Setting, method: dict[str, Any], lengths: Lengths, repeats: int, compiled: bool = False) -> Round:
    """Forward with the loss, backward and the optimizer's step, on one padded batch of all rows."""
    model = attach(setting.base(), method_config(method)).train()
    if compiled and (reason := compile_layers(model.base_model)):
        raise RuntimeError(reason)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)

    def measure(brief: bool) -> dict[str, Any]:
        batch = collate(training_rows([SHORT] * len(lengths) if brief else lengths, setting.vocabulary))
        batch = {name: tensor.to(device()) for name, tensor in batch.items()}

        def steps() -> None:
            for _ in range(repeats):
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()

        return {"seconds": seconds(steps) / repeats}

    return measure


def limit(setting: Setting, way: str, lengths: Lengths, virtual: int, repeats: int) -> Round:
    """The frozen decoder alone, forward and backward to its input embeddings, on the rows' real and virtual positions
    and no padding. It has no head and no loss: the gradient at its end is a fixed tensor."""
    base = setting.base().requires_grad_(False)

    def measure(brief: bool) -> dict[str, Any]:
        sizes = [prompt + answer + virtual for prompt, answer in ([SHORT] * len(lengths) if brief else lengths)]
        calls = [_call(base, group, packed=way == "packed") for group in _groups(way, sizes)]
        gradients = [torch.randn_like(call["inputs_embeds"]) for call in calls]

        def steps() -> None:
            for _ in range(repeats):
                for call, gradient in zip(calls, gradients, strict=True):
                    hidden = base.model(**call, use_cache=False).last_hidden_state
                    torch.autograd.grad(hidden, call["inputs_embeds"], gradient)

        return {"seconds": seconds(steps) / repeats}

    return measure


def _groups(way: str, sizes: list[int]) -> list[list[int]]:
    """The sizes of the rows that are computed in one call."""
    if way == "row by row":
        return [[size] for size in sizes]
    return [sizes] if way == "packed" else [list(group) for _, group in groupby(sorted(sizes))]


def _call(base: Any, group: list[int], packed: bool) -> dict[str, torch.Tensor]:
    """Random tokens as the decoder takes them. Packed rows stand behind one another, and their positions, which start
    again at 0, tell `transformers` to keep their attention apart."""
    shape = (1, sum(group)) if packed else (len(group), group[0])
    ids = torch.randint(base.config.vocab_size, shape, device=device())
    call = {"inputs_embeds": base.get_input_embeddings()(ids).detach().requires_grad_()}
    if packed:
        call["position_ids"] = torch.cat([torch.arange(size, device=device()) for size in group])[None]
    return call
