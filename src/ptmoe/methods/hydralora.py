"""HydraLoRA (Tian et al. 2024, arXiv:2404.19245): LoRA with one A, several B and a router that mixes them per token.

ω  = softmax(W_g x)                            W_g: (N, in), no bias; x is a token's input to the module
y  = W x + (α / R) Σ_i ω_i B_i A x             A: (R, in), B_i: (out, R)

As published, A and the router start as a linear layer does and every B at zero. The router has no gradient before the
first step, and its random start is what makes the B differ: each gets its own share of every token's gradient. Routing
is per token and per module, so there is no gate of an *input* to report.
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import Size, fill_as_linear
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.parts import Part, PartsConfig


class HydraPart(Part):
    """Tensors: `A (R, in)`, `B (N, out, R)`, `router (N, in)`."""

    def __init__(self, config: "HydraLoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.A = nn.Parameter(torch.empty(config.rank, in_features))
        self.B = nn.Parameter(torch.empty(config.num_experts, out_features, config.rank))
        self.router = nn.Parameter(torch.empty(config.num_experts, in_features))
        self.scaling = config.scaling

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        for parameter in (self.A, self.router):
            fill_as_linear(parameter, parameter.shape[1], generator)
        self.B.zero_()

    def route(self, x: Tensor) -> Tensor:
        """`(…, in)` to the weight of each B, `(…, N)`."""
        return nn.functional.linear(x, self.router).softmax(-1, dtype=torch.float32)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        low = nn.functional.linear(x, self.A)  # (…, R)
        mixed = (self.route(x)[..., :, None] * low[..., None, :]).flatten(-2)  # (…, N·R)
        return self.scaling * nn.functional.linear(mixed, self.B.transpose(0, 1).flatten(1))


class HydraLoRAConfig(LowRankConfig, PartsConfig):
    """HydraLoRA: `R·(in + N·out) + N·in` trainable parameters for each target module.

    Attributes:
        num_experts: `N`, the number of B matrices; with a single one it is LoRA.
    """

    method = "hydralora"
    order = 110
    figure_color = ("#882255", "#d9739f")
    figure_marker = "X"
    part_class = HydraPart
    num_experts: Size = 2
