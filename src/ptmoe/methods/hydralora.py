"""HydraLoRA (Tian et al. 2024, arXiv:2404.19245): LoRA with one A, several B and a router that mixes them per token.

ω  = softmax(W_g x)                            W_g: (N, in), no bias; x is a token's input to the module
y  = W x + (α / R) Σ_i ω_i B_i A x             A: (R, in), B_i: (out, R)

As published, A and the router start as a linear layer does and every B at zero. The router has no gradient before the
first step, and its random start is what makes the B differ: each gets its own share of every token's gradient. Routing
is per token and per module, so there is no gate of an *input* to report. The modules themselves are kept: a hook adds
to their output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptmoe.methods.base import Batches, InitialEmbeddings, PreTrainedModel, Size, fill_as_linear
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.weights import WeightEncoder, features_of, modules_named


class HydraLoRAConfig(LowRankConfig):
    """HydraLoRA: `R·(in + N·out) + N·in` trainable parameters for each target module.

    Attributes:
        num_experts: `N`, the number of B matrices; with a single one it is LoRA.
    """

    method = "hydralora"
    order = 110
    figure_color = ("#882255", "#d9739f")
    figure_marker = "X"
    num_experts: Size = 2

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> HydraLoRA:
        return HydraLoRA(self.replace(target_modules=self.target_names(base)), base)


class HydraLoRA(WeightEncoder):
    config: HydraLoRAConfig

    def __init__(self, config: HydraLoRAConfig, base: PreTrainedModel) -> None:
        super().__init__(config, base)
        modules = modules_named(base, config.target_modules or [])
        self.heads = [HydraHeads(config, *features_of(module)) for module in modules.values()]
        names = (name.replace(".", "/") for name in modules)  # a ModuleDict's keys may have no dots
        self.parts = nn.ModuleDict(dict(zip(names, self.heads, strict=True)))
        self.hooks = [
            module.register_forward_hook(heads.add) for module, heads in zip(modules.values(), self.heads, strict=True)
        ]

    def initialise(self, source: InitialEmbeddings) -> None:
        for heads in self.heads:
            heads.initialise(source.generator)

    def tensors(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value for key, value in self.parts.state_dict().items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for heads in self.heads:
            heads.enabled = False
        try:
            yield
        finally:
            for heads in self.heads:
                heads.enabled = True

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class HydraHeads(nn.Module):
    """What HydraLoRA adds to one linear module. Tensors: `A (R, in)`, `B (N, out, R)`, `router (N, in)`."""

    def __init__(self, config: HydraLoRAConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.rank, in_features, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(config.num_experts, out_features, config.rank, dtype=torch.float32))
        self.router = nn.Parameter(torch.empty(config.num_experts, in_features, dtype=torch.float32))
        self.scaling = config.scaling
        self.enabled = True

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        for parameter in (self.A, self.router):
            fill_as_linear(parameter, parameter.shape[1], generator)
        self.B.zero_()

    def route(self, x: Tensor) -> Tensor:
        """`(…, in)` to the weight of each B, `(…, N)`."""
        return nn.functional.linear(x, self.router).softmax(-1, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        x = x.to(self.A.dtype)
        low = nn.functional.linear(x, self.A)  # (…, R)
        mixed = (self.route(x)[..., :, None] * low[..., None, :]).flatten(-2)  # (…, N·R)
        return self.scaling * nn.functional.linear(mixed, self.B.transpose(0, 1).flatten(1))

    def add(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return (output + self(arguments[0])).to(output.dtype) if self.enabled else output
