"""A frozen linear layer of a base by itself, as `torch` computes it and as `ptmoe.fast.linear` does; the head from the
last positions of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.machine import Setting, memory, seconds
from benchmarks.shapes import SHAPES
from benchmarks.worker import Round
from ptmoe.fast.linear import OneDNNForward


def layer(setting: Setting, way: str, of: str, rows: int, backward: bool, repeats: int) -> Round:
    """Forward, and with `backward` to the layer's input as well.

    Args:
        setting: the base's shape and dtype.
        way: `"torch"` or `"oneDNN"`.
        of: the `"head"`, or a layer's `"up"` projection.
        rows: positions.
        backward: as in training.
        repeats: that the time is the mean of.
    """
    shape = SHAPES[setting.shape]
    outputs = {"head": shape.vocabulary, "up": shape.intermediate}[of]
    linear = nn.Linear(shape.hidden, outputs, bias=False, dtype=getattr(torch, setting.dtype)).requires_grad_(False)
    forward = OneDNNForward(linear) if way == "oneDNN" else linear
    inputs = torch.randn(rows, shape.hidden, dtype=linear.weight.dtype, requires_grad=backward)
    gradient = torch.randn(rows, outputs, dtype=linear.weight.dtype)
    setting.held = memory()

    def measure(_: bool) -> dict[str, Any]:
        def compute() -> None:
            for _ in range(repeats):
                made = forward(inputs)
                if backward:
                    torch.autograd.grad(made, inputs, gradient)

        return {"seconds": seconds(compute) / repeats}

    return measure


def first_scores(setting: Setting, way: str, rows: int, tokens: int, repeats: int) -> Round:
    """The scores of the first new token: the head at the last position of each row, forward.

    Args:
        setting: the base's shape and dtype.
        way: `"gaps"`, a view of the hidden states of all positions, or `"copied"`.
        rows: of the batch, `tokens` each.
        repeats: that the time is the mean of.
    """
    shape = SHAPES[setting.shape]
    head = nn.Linear(shape.hidden, shape.vocabulary, bias=False, dtype=getattr(torch, setting.dtype))
    head.requires_grad_(False)  # of weights that might train torch makes no copies
    last = torch.randn(rows, tokens, shape.hidden, dtype=head.weight.dtype)[:, -1:]
    setting.held = memory()

    def measure(_: bool) -> dict[str, Any]:
        def compute() -> None:
            for _ in range(repeats):
                head(last.contiguous() if way == "copied" else last)

        return {"seconds": seconds(compute) / repeats}

    return measure
