"""Compacter (Karimi Mahabadi, Henderson and Ruder 2021, arXiv:2106.04647): adapters behind the output projections of
attention and of the feed-forward part, whose matrices are sums of Kronecker products.

y = W x + b,   y + W_U gelu(W_D y)        W_D: (M, H), W_U: (H, M), M = n·m
W_D = Σ_i A_i ⊗ (s_i t_i)                 A_i: (n, n); s_i: (m, r), t_i: (r, H/n), of each adapter; i = 1 … n
W_U = Σ_i A_i ⊗ (u_i v_i)                 u_i: (H/n, r), v_i: (r, m)

The A_i are shared by all matrices of all adapters. What was chosen here: the two layers have no biases, layer
normalisations stay frozen, and u_i starts at zero, so that the base is unchanged, the others normal so that numbers
keep their scale.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import PreTrainedModel, Size
from ptmoe.methods.parts import Part, PartsConfig
from ptmoe.methods.weights import modules_named

ATTENTION = ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense", "self_attn.dense")
FEED_FORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out")


class Rules(nn.Module):
    """Tensor: `A (n, n, n)`, the left Kronecker factors of every matrix."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        self.A.copy_(torch.randn(self.A.shape, generator=generator) / len(self.A))


class CompacterPart(Part):
    """Tensors: `s (n, m, r)`, `t (n, r, H/n)`, `u (n, H/n, r)`, `v (n, r, m)`."""

    def __init__(self, config: "CompacterConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        n, width, rank = config.phm_dim, config.width, config.rank
        if out_features % n:
            raise PtmoeError(f"phm_dim {n} does not divide the {out_features} outputs of a module: take a divisor")
        if rank > (limit := min(width, out_features // n)):
            raise PtmoeError(f"rank {rank} exceeds {limit}, that of a {width} × {out_features // n} block: lower it")
        self.s = nn.Parameter(torch.empty(n, width, rank))
        self.t = nn.Parameter(torch.empty(n, rank, out_features // n))
        self.u = nn.Parameter(torch.empty(n, out_features // n, rank))
        self.v = nn.Parameter(torch.empty(n, rank, width))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        for parameter in (self.s, self.t, self.v):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[2] ** 0.5)
        self.u.zero_()

    def multiply(self, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        """`Σ_i (A_i ⊗ left_i right_i) x`, with none of these matrices ever made."""
        blocks = x.unflatten(-1, (len(right), -1))  # (…, n, in/n)
        low = torch.einsum("irq,...cq,iac->...air", right, blocks, self.shared.A.to(x.device))
        return torch.einsum("ipr,...air->...ap", left, low).flatten(-2)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        hidden = nn.functional.gelu(self.multiply(self.s, self.t, output.float()))
        return self.multiply(self.u, self.v, hidden)


class CompacterConfig(PartsConfig):
    """Compacter: `2·r·(H + n·m)` trainable parameters for each target module of `H` outputs, and `n³` shared ones.

    Attributes:
        phm_dim: `n`, Kronecker products in each matrix; it divides `H`. The bottleneck is `n·m` wide.
        width: `m`.
        rank: `r`, of the right Kronecker factors.
        target_modules: the last parts of the names of the projections that adapters stand behind; by default those at
            the end of attention and of the feed-forward part. A saved adapter names them.
    """

    method = "compacter"
    order = 510
    default_learning_rate = 3e-2
    free_sizes = ("width",)
    part_class = CompacterPart
    phm_dim: Size = 4
    width: Size = 6
    rank: Size = 1
    target_modules: list[str] | None = None

    def default_names(self, base: PreTrainedModel) -> list[str]:
        """Where the base has neither of a place's usual names, its first, for `target_names` to refuse."""
        return [
            next((name for name in place if modules_named(base, [name])), place[0])
            for place in (ATTENTION, FEED_FORWARD)
        ]

    def shared_by(self, features: Any) -> nn.Module:
        return Rules(self.phm_dim)
