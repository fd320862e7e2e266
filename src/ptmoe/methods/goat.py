"""GOAT (Fan et al. 2025, arXiv:2502.16894): a mixture of LoRA experts, each from its own segment of the weight's
spectrum, with a scaling that matches the gradient of full fine-tuning.

W = U Σ Vᵀ in N segments of ⌊min(in, out) / N⌋ components; expert i has the first R of the i-th, U_i Σ_i V_iᵀ
ω  = softmax of the K largest of W_g x          W_g: (N, in), no bias; x is a token's input to the module
y  = W x + s (Σ_i ω_i B_i A_i - 1/N Σ_i B°_i A°_i) x              A_i: (R, in), B_i: (out, R)
s  = √(3 η in / R),  B°_i = U_i (Σ_i / (s ρ))^½,  A°_i = (Σ_i / (s ρ))^½ V_iᵀ         where A and B start, kept frozen

The second sum, the mean of the first under balanced routing, is what the paper takes off the weight; so the start is
the base in the mean over tokens, not for each. R is the rank of an expert, as in the authors' public code, and the
router starts as a linear layer does. The paper's load-balancing loss is left out: it is a statistic of all positions of
a batch, of which training here computes only those that the loss needs.
"""

from math import sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import QUANTIZATIONS, Size, fill_as_linear
from ptmoe.methods.parts import Part, PartsConfig, leading

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class GOATPart(Part):
    """Tensors: `A (N, R, in)`, `B (N, out, R)`, `router (N, in)`; frozen `A_start`, `B_start`, of the same shapes."""

    A_start: Tensor
    B_start: Tensor

    def __init__(self, config: "GOATConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        experts, rank, limit = config.num_experts, config.rank, min(in_features, out_features)
        if experts * rank > limit:
            raise PtmoeError(
                f"num_experts {experts} × rank {rank} exceeds min(in, out) = {limit} of a {in_features} × "
                f"{out_features} module, whose singular components the experts share: lower one of them"
            )
        self.A = nn.Parameter(torch.empty(experts, rank, in_features))
        self.B = nn.Parameter(torch.empty(experts, out_features, rank))
        self.router = nn.Parameter(torch.empty(experts, in_features))
        self.register_buffer("A_start", torch.empty(experts, rank, in_features))
        self.register_buffer("B_start", torch.empty(experts, out_features, rank))
        self.top_k = min(config.top_k, experts)
        self.scaling = sqrt(3 * config.eta * in_features / rank)
        self.shrinkage = self.scaling * config.rho
        self.segment = limit // experts

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        experts, rank, _ = self.A.shape
        index = (self.segment * torch.arange(experts)[:, None] + torch.arange(rank)).to(self.A.device)  # (N, R)
        left, values, right = leading(module, int(index.max()) + 1)
        root = (values / self.shrinkage).sqrt()
        self.A_start.copy_((root[:, None] * right)[index])
        self.B_start.copy_((left * root).T[index].transpose(1, 2))
        self.A.copy_(self.A_start)
        self.B.copy_(self.B_start)
        fill_as_linear(self.router, self.router.shape[1], generator)

    def route(self, x: Tensor) -> Tensor:
        """`(…, in)` to the weight of each expert, `(…, N)`."""
        scores = nn.functional.linear(x, self.router)
        others = scores < scores.topk(self.top_k, -1).values[..., -1:]
        return scores.masked_fill(others, -torch.inf).softmax(-1, dtype=torch.float32)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a small difference of large numbers
            low = nn.functional.linear(x, self.A.flatten(0, 1)).unflatten(-1, self.A.shape[:2])  # (…, N, R)
            mixed = (self.route(x)[..., None] * low).flatten(-2)  # (…, N·R)
            start = nn.functional.linear(x, self.A_start.flatten(0, 1)) / len(self.A)
            return self.scaling * (_together(mixed, self.B) - _together(start, self.B_start))


def _together(low: Tensor, B: Tensor) -> Tensor:
    """The sum of `B_i (out, R)` times the i-th part of `low (…, N·R)`."""
    return nn.functional.linear(low, B.transpose(0, 1).flatten(1))


class GOATConfig(PartsConfig):
    """GOAT: `N·R·(in + out) + N·in` trainable parameters for each target module.

    Attributes:
        rank: `R`, of each expert.
        num_experts: `N`.
        top_k: `K`, the experts that a token goes through; all of them where there are fewer.
        eta: `η`, how many times as large full fine-tuning's learning rate would be.
        rho: `ρ`, how much smaller the experts start than their part of the weight.
    """

    method = "goat"
    order = 450
    default_learning_rate = 3e-3
    free_sizes = ("rank", "num_experts")
    unsupported_quantizations = QUANTIZATIONS
    part_class = GOATPart
    rank: Size = 1
    num_experts: Size = 8
    top_k: Size = 2
    eta: Positive = 1.0
    rho: Positive = 10.0
