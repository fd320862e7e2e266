"""LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604): a small matrix between the weight's leading singular vectors.

W = U Σ Vᵀ
y = W x + B M A x                  A = Σ_R V_Rᵀ (R, in) and B = U_R (out, R), both frozen, M (R, R) trained

M starts with standard deviation 10⁻⁵, so the base is as it was to five digits of each singular value. The paper writes
inputs as rows to the left of W; this is its form for columns. No other factor, as LoRA's α / R, scales the product.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ptmoe.methods.base import QUANTIZATIONS, Size
from ptmoe.methods.parts import Part, PartsConfig, check_rank, leading


class LoRAXSPart(Part):
    """Tensors: `M (R, R)`; frozen `A (R, in)`, `B (out, R)`."""

    A: Tensor
    B: Tensor

    def __init__(self, config: "LoRAXSConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        check_rank(config.rank, in_features, out_features)
        self.M = nn.Parameter(torch.empty(config.rank, config.rank))
        self.register_buffer("A", torch.empty(config.rank, in_features))
        self.register_buffer("B", torch.empty(out_features, config.rank))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        left, values, right = leading(module, len(self.M))
        self.A.copy_(values[:, None] * right)
        self.B.copy_(left)
        self.M.copy_(1e-5 * torch.randn(self.M.shape, generator=generator))

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B @ self.M)


class LoRAXSConfig(PartsConfig):
    """LoRA-XS: `R²` trainable parameters for each target module.

    Attributes:
        rank: `R`, the number of singular components.
    """

    method = "lora-xs"
    order = 400
    default_learning_rate = 3e-2
    free_sizes = ("rank",)
    unsupported_quantizations = QUANTIZATIONS
    part_class: ClassVar[type[Part]] = LoRAXSPart
    rank: Size = 16
