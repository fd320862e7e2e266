"""HydraLoRA (Tian et al. 2024, arXiv:2404.19245): LoRA with one A, several B and a router that mixes them per token.

ω  = softmax(W_g x)                            W_g: (N, in), no bias; x is a token's input to the module
y  = W x + (α / R) Σ_i ω_i B_i A x             A: (R, in), B_i: (out, R)

As published, A and the router start as a linear layer does and every B at zero. The router has no gradient before the
first step, and the random one is what makes the B differ: each gets its own share of every token's gradient. Routing
is per token and per module, so there is no gate of an *input* to report. The modules themselves stay in place: a hook
adds to what they give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ptmoe.methods.base import Batches, InitialEmbeddings, Size
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.weights import WeightEncoder, named, size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HydraLoRAConfig(LowRankConfig):
    """HydraLoRA: `R·(in + N·out) + N·in` trained numbers for each target module.

    Attributes:
        num_experts: `N`, the number of B matrices; with one it is LoRA.
    """

    method: ClassVar[str] = "hydralora"
    num_experts: Size = 2

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> HydraLoRA:
        return HydraLoRA(self.replace(target_modules=self.fitted(base)), base)


class HydraLoRA(WeightEncoder):
    config: HydraLoRAConfig

    def __init__(self, config: HydraLoRAConfig, base: PreTrainedModel) -> None:
        super().__init__(config, base)
        modules = named(base, config.target_modules or [])
        # A ModuleDict takes no dots.
        self.parts = nn.ModuleDict({name.replace(".", "/"): Heads(config, *size(one)) for name, one in modules.items()})
        self.hooks = [
            module.register_forward_hook(part.add) for module, part in zip(modules.values(), self._heads(), strict=True)
        ]

    def _heads(self) -> list[Heads]:
        return [part for part in self.parts.values() if isinstance(part, Heads)]

    def initialise(self, source: InitialEmbeddings) -> None:
        for part in self._heads():
            part.initialise(source.generator)

    def tensors(self) -> dict[str, Tensor]:
        return {key.replace("/", "."): value for key, value in self.parts.state_dict().items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for part in self._heads():
            part.enabled = False
        try:
            yield
        finally:
            for part in self._heads():
                part.enabled = True

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class Heads(nn.Module):
    """What HydraLoRA adds to one linear module."""

    def __init__(self, config: HydraLoRAConfig, takes: int, gives: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(config.rank, takes, dtype=torch.float32))
        self.B = nn.Parameter(torch.empty(config.num_experts, gives, config.rank, dtype=torch.float32))
        self.router = nn.Parameter(torch.empty(config.num_experts, takes, dtype=torch.float32))
        self.scaling = config.scaling
        self.enabled = True

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        for parameter in (self.A, self.router):
            bound = parameter.shape[1] ** -0.5
            parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))
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
