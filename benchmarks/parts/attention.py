"""The causal attention of one layer by itself, by `torch`'s own kernel and as `ptmoe.fast.attention` computes it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.machine import Setting, memory, seconds
from benchmarks.shapes import SHAPES
from benchmarks.worker import Round
from ptmoe.fast.attention import causal_products, kernel


def layer(setting: Setting, way: str, rows: int, tokens: int, repeats: int) -> Round:
    """Forward and backward.

    Args:
        setting: the base's shape and dtype.
        way: `"torch"` or `"products"`.
        rows: of the batch, `tokens` each.
        repeats: that the time is the mean of.
    """
    shape, dtype = SHAPES[setting.shape], getattr(torch, setting.dtype)
    size = shape.hidden // shape.heads
    query, key, value = (
        torch.randn(rows, tokens, heads, size, dtype=dtype).transpose(1, 2).requires_grad_()  # as a layer makes them
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    attention = kernel if way == "torch" else causal_products
    gradient = torch.randn_like(query)
    setting.held = memory()

    def measure(_: bool) -> dict[str, Any]:
        def compute() -> None:
            for _ in range(repeats):
                made = attention(query, key, value)
                torch.autograd.grad(made, (query, key, value), gradient)

        return {"seconds": seconds(compute) / repeats}

    return measure
