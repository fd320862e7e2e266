"""Attention by other kernels than those that `torch` would choose.

On a CUDA device, not cuDNN's: `torch` prefers it on some GPUs, and it builds a plan for every batch shape that it has
not seen, forward and backward: tenths of a second, where a step of a small base takes hundredths
(github.com/modelscope/FunASR/issues/3704 profiles it). The rows of a data set have many lengths, so nearly every step
would wait for one. torch's other kernels need no plans. A process whose batches all have one shape loses a little by
it.

On a CPU in bfloat16, three plain operations for short rows: torch's own kernel takes three times as long at 100
tokens on an AMD processor, and 1.7 times at 250 (`python -m benchmarks attention`).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.fast.measured import is_faster

SHORT = 512  # tokens of a row, and
LARGEST = 2**24  # probabilities of a batch, S² for each row and head: they are kept for the backward pass
MEASURED = ((8, 9, 3, 100, 64), (4, 9, 3, 250, 64))  # rows, heads, those of keys, tokens and size of a head
KNOWN = {"dropout", "is_causal", "position_ids", "scaling", "sliding_window", "use_cache"}  # options of an attention


def attention_obstacle(base: PreTrainedModel) -> str | None:
    """Why cuDNN's attention is not left out; None where it is."""
    if base.device.type != "cuda":
        return "the base is not on a CUDA device"
    if base.is_activation_checkpointing:  # they would be computed with another kernel than the first time
        return "layers are computed again in the backward pass"
    return None


@contextmanager
def without_plans(base: PreTrainedModel) -> Iterator[None]:
    """Within it `base` computes its attention with kernels that need no plan. The switch is the process's."""
    on = attention_obstacle(base) is None and torch.backends.cuda.cudnn_sdp_enabled()
    if on:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if on:
            torch.backends.cuda.enable_cudnn_sdp(True)


def products_obstacle(base: PreTrainedModel) -> str | None:
    """Why the attention of short rows is left to torch's own kernel; None where it is computed by plain products."""
    if base.device.type != "cpu":
        return "the base is not on a CPU"
    if base.dtype != torch.bfloat16:
        return "the base is not in bfloat16"
    if base.config.get_text_config()._attn_implementation != "sdpa":
        return "its attention is not torch's"
    return None if _products_are_faster() else "torch's own kernel is as fast on this machine"


def by_products(module: nn.Module, query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether `causal_products` computes what this attention, of `query (B, h, S, d)`, asks for, on a base that
    `products_obstacle` lets pass; there is no mask beside the options."""
    given = {name for name, value in options.items() if value is not None}
    causal = options.get("is_causal")
    return (
        query.shape[2] <= SHORT
        and query.shape[:3].numel() * query.shape[2] <= LARGEST
        and given <= KNOWN
        and not options.get("dropout")
        and bool(getattr(module, "is_causal", True) if causal is None else causal)
    )


def causal_products(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Causal attention: `(B, h, S, d)`, `(B, k, S, d)` and `(B, k, S, v)`, `k` a divisor of `h`, to `(B, h, S, v)`.

    Heads that share a key are rows of one product.
    """
    batch, heads, length, size = query.shape
    groups, shared = heads // key.shape[1], batch * key.shape[1]
    hidden = torch.full((length, length), -math.inf, dtype=query.dtype).triu_(1).repeat(groups, 1)
    scores = torch.baddbmm(
        hidden,
        query.reshape(shared, groups * length, size),
        key.reshape(shared, length, size).transpose(1, 2),
        alpha=size**-0.5 if scaling is None else scaling,
    )
    return (scores.softmax(-1) @ value.reshape(shared, length, -1)).view(batch, heads, length, -1)


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by torch's own."""
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@cache
def _products_are_faster() -> bool:
    def operands() -> Iterator[tuple[Tensor, ...]]:
        for rows, heads, shared, tokens, size in MEASURED:
            shapes = ((rows, of, tokens, size) for of in (heads, shared, shared))
            yield tuple(torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)

    def trained(attention: Callable[..., Tensor], *tensors: Tensor) -> None:
        with torch.enable_grad():
            attention(*tensors).sum().backward()

    ours, theirs = partial(trained, causal_products), partial(trained, kernel)
    return is_faster("attention", ours, theirs, operands, one_thread=True)  # both are spread over rows and heads
