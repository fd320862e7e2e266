"""Compiling a base's layers, each by itself: one compilation serves them all, and attention stays as it is."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel


def compile_layers(base: PreTrainedModel, backend: str = "inductor") -> str | None:
    """Compile the repeated layers of a base for any length of input; where that fails, warn and leave them as they are.

    Compilation happens at the first call, so one is made here: a short input, forward and backward.

    Args:
        base: whose layers.
        backend: of `torch.compile`.

    Returns:
        What went wrong; None where the layers are compiled.
    """
    import torch._dynamo.config as compiler
    from transformers.modeling_layers import GradientCheckpointingLayer

    compiler.skip_nnmodule_hook_guards = False  # else one compilation serves modules with hooks and without alike
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    reason = None if layers else "it has no repeated layers"
    embedding = base.get_input_embeddings()
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    try:
        for length in (5, 9):  # the second shows whether lengths may differ
            embeds = embedding(torch.arange(length, device=embedding.weight.device)[None]).detach().requires_grad_()
            base(inputs_embeds=embeds, use_cache=False).logits.float().sum().backward()
    except Exception as error:  # whatever the compiler, or the one behind it, runs into
        reason = " ".join(str(error).split())[:200]
    if reason is None:
        return None
    for layer in layers:
        layer._compiled_call_impl = None
    torch.compiler.reset()
    warnings.warn(f"{type(base).__name__} is not compiled ({reason}): going on without", stacklevel=2)
    return reason


def compilation_obstacle(base: PreTrainedModel) -> str | None:
    """Why the layers of this base are not compiled; None where they are."""
    if any(module._compiled_call_impl is not None for module in base.modules()):
        return None
    return "not asked for (--torch-compile), or compilation failed"


def replaceable(layer: nn.Module) -> bool:
    """Whether another forward may stand in for the layer's own: no compiler or other library has put one there."""
    return layer._compiled_call_impl is None and "forward" not in vars(layer)
