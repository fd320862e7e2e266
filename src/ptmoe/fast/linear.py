"""A base's frozen linear layers in float32 on a CPU, by oneDNN.

In half precision `torch` calls oneDNN itself; float32 it gives to MKL, which on an AMD processor takes 1.4 to 2.5 times
as long (`python -m benchmarks linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def by_onednn(base: PreTrainedModel) -> Iterator[None]:
    """Within it, linear layers of `base` that do not train compute the same product, rounded otherwise."""
    layers = _layers(base)
    for layer in layers:
        vars(layer)["forward"] = _Forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _layers(base: PreTrainedModel) -> list[nn.Linear]:
    if base.device.type != "cpu" or not _AVAILABLE or torch.is_autocast_enabled("cpu"):
        return []
    modules = list(base.modules())
    # Recomputed or compiled, a layer is run when the forward that stands here for a while is gone.
    if base.is_activation_checkpointing or any(module._compiled_call_impl is not None for module in modules):
        return []
    return [
        module
        for module in modules
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        and "forward" not in vars(module)  # another library has put its own there
    ]


class _Forward:
    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32:
            return nn.functional.linear(input, self.layer.weight, self.layer.bias)
        made: Tensor = _Linear.apply(input, self.layer.weight, self.layer.bias)
        return made


class _Linear(torch.autograd.Function):
    """`(…, in)` to `(…, out)`; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight.t(), None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What `torch.compile` calls for a linear layer on a CPU; there is no public name for it.
    made: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return made


def _works() -> bool:
    try:
        rows = torch.arange(6.0).view(2, 3)
        return torch.equal(_product(rows, rows, None), rows @ rows.T)
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN, or one that has renamed it
        return False


_AVAILABLE = torch.backends.mkldnn.is_available() and _works()
