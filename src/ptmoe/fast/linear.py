"""A base's linear layers as fast as the machine allows: frozen ones in float32 on a CPU by oneDNN, and the head of the
vocabulary from rows without gaps between them.

In half precision `torch` calls oneDNN itself; float32 goes to MKL, which takes 1.4 to 2.5 times as long on an AMD
processor (`python -m benchmarks linear`). Which of the two is faster is measured once for a machine (`fast.measured`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.fast.compiled import replaceable
from ptmoe.fast.measured import is_faster

MEASURED = ((256, 512, 1408), (32, 512, 16384))  # rows, inputs and outputs: a layer, and a head at a few positions


@contextmanager
def use_onednn(base: PreTrainedModel) -> Iterator[None]:
    """Within it, frozen linear layers of `base` compute the same product, rounded otherwise, where that is faster."""
    layers, _ = _replaceable_layers(base)
    for layer in layers:
        vars(layer)["forward"] = OneDNNForward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


@contextmanager
def gapless_head(base: PreTrainedModel) -> Iterator[None]:
    """Within it the projection to the vocabulary reads hidden states that lie one behind the other.

    The last positions of several rows do not: `torch` multiplies such `(B, 1, H)` by frozen weights row by row, and in
    bfloat16 on a CPU copies all of the weights for each row first, which takes hundreds of times as long
    (`python -m benchmarks head`).
    """
    head = base.get_output_embeddings()
    if head is None:
        yield
        return
    with head.register_forward_pre_hook(_without_gaps):
        yield


def _without_gaps(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.contiguous() for argument in arguments)


def onednn_obstacle(base: PreTrainedModel) -> str | None:
    """Why the linear layers of this base are left to torch; None where oneDNN computes them."""
    return _replaceable_layers(base)[1]


def _replaceable_layers(base: PreTrainedModel) -> tuple[list[nn.Linear], str | None]:
    """The layers that oneDNN computes, or none and why; one walk through the base, for it is done at every step."""
    if base.device.type != "cpu":
        return [], "the base is not on a CPU"
    if not _AVAILABLE:
        return [], "this build of torch has no oneDNN product"
    if torch.is_autocast_enabled("cpu"):
        return [], "autocast chooses the dtype of each layer"
    if base.is_activation_checkpointing:
        return [], "layers are computed again in the backward pass"
    # A base with compiled layers runs some when the forward that is put there for a while is gone.
    modules = list(base.modules())
    compiled = any(module._compiled_call_impl is not None for module in modules)
    layers = [
        module
        for module in ([] if compiled else modules)
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        and replaceable(module)
    ]
    if not layers:
        return [], "no linear layer is frozen, in float32 and free to be replaced"
    return (layers, None) if _faster_here() else ([], "torch's own product is as fast on this machine")


class OneDNNForward:
    """The forward of a linear layer: `(…, in)` to `(…, out)`."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        if input.dtype != torch.float32:
            return nn.functional.linear(input, self.layer.weight, self.layer.bias)
        output: Tensor = _Linear.apply(input, self.layer.weight, self.layer.bias)
        return output


class _Linear(torch.autograd.Function):
    """`(…, in)` to `(…, out)`; the weight gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        output = _product(input, weight, bias)
        # As `nn.functional.linear` does: some bases change a layer's output in place, which autograd forbids on a view.
        whole: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight.t(), None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What `torch.compile` calls for a linear layer on a CPU; there is no public name for it.
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


@cache
def _faster_here() -> bool:
    def operands() -> Iterator[tuple[Tensor, Tensor, None]]:
        for count, inputs, outputs in MEASURED:
            yield torch.ones(count, inputs), torch.ones(outputs, inputs), None

    with torch.no_grad():
        return is_faster("onednn", _product, nn.functional.linear, operands)


def _works() -> bool:
    try:
        rows = torch.arange(6.0).view(2, 3)
        return torch.equal(_product(rows, rows, None), rows @ rows.T)
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN, or one that has renamed it
        return False


_AVAILABLE = torch.backends.mkldnn.is_available() and _works()
