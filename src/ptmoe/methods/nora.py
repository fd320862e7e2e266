"""NoRA, nested low-rank adaptation (Lin et al. 2024, arXiv:2408.10280): a frozen LoRA from the weight's SVD, and a
LoRA within it that trains.

W = U Σ Vᵀ,  A = Σ_R^½ V_Rᵀ,  B = U_R Σ_R^½          A: (R, in), B: (out, R), frozen
y = W x + B B' A' A x                                A': (r, R), B': (R, r), trained, r ≤ R

B' starts at zero and A' as a linear layer does, so the base is unchanged. The paper freezes the outer pair; that each
of them takes the root of the singular values, and that there is no factor α / r, was chosen here.
"""

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import QUANTIZATIONS, Size, fill_as_linear
from ptmoe.methods.parts import Part, PartsConfig, check_rank, leading


class NoRAPart(Part):
    """Tensors: `A (R, in)`, `B (out, R)`, frozen; `inner_A (r, R)`, `inner_B (R, r)`."""

    A: Tensor
    B: Tensor

    def __init__(self, config: "NoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        check_rank(config.rank, in_features, out_features)
        inner = config.inner
        self.register_buffer("A", torch.empty(config.rank, in_features))
        self.register_buffer("B", torch.empty(out_features, config.rank))
        self.inner_A = nn.Parameter(torch.empty(inner, config.rank))
        self.inner_B = nn.Parameter(torch.empty(config.rank, inner))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        left, values, right = leading(module, len(self.A))
        self.A.copy_(values.sqrt()[:, None] * right)
        self.B.copy_(left * values.sqrt())
        fill_as_linear(self.inner_A, self.inner_A.shape[1], generator)
        self.inner_B.zero_()

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        for factor in (self.A, self.inner_A, self.inner_B, self.B):
            x = nn.functional.linear(x, factor)
        return x


class NoRAConfig(PartsConfig):
    """NoRA: `2·R·r` trainable parameters for each target module.

    Attributes:
        rank: `R`, of the frozen outer pair.
        inner_rank: `r`, of the trained inner one, at most `R`; by default a quarter of it.
    """

    method = "nora"
    order = 480
    default_learning_rate = 3e-2
    unsupported_quantizations = QUANTIZATIONS
    free_sizes = ("rank",)
    part_class = NoRAPart
    rank: Size = 32
    inner_rank: Size | None = None

    @property
    def inner(self) -> int:
        """
        Raises:
            PtmoeError: the inner rank exceeds the outer one.
        """
        inner = max(1, self.rank // 4) if self.inner_rank is None else self.inner_rank
        if inner > self.rank:
            raise PtmoeError(f"inner_rank {inner} exceeds rank {self.rank}: lower it, or raise rank")
        return inner
