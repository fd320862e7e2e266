"""SVFit (Sun et al. 2024, arXiv:2409.05926): the leading singular values of the weight are trained.

W = U Σ Vᵀ
y = W x + U_R diag(δ) V_Rᵀ x       U_R (out, R) and V_Rᵀ (R, in) frozen, δ (R,) trained

The paper trains Σ_R itself beside a frozen rest W - U_R Σ_R V_Rᵀ; δ is its difference to where it started, so it starts
at zero, the base is as it was, and no weight is rewritten.
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import QUANTIZATIONS, Size
from ptmoe.methods.parts import Part, PartsConfig, check_rank, leading


class SVFitPart(Part):
    """Tensors: `delta (R,)`; frozen `U (out, R)`, `V (R, in)`."""

    U: Tensor
    V: Tensor

    def __init__(self, config: "SVFitConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        check_rank(config.rank, in_features, out_features)
        self.delta = nn.Parameter(torch.empty(config.rank))
        self.register_buffer("U", torch.empty(out_features, config.rank))
        self.register_buffer("V", torch.empty(config.rank, in_features))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        left, _, right = leading(module, len(self.delta))
        self.U.copy_(left)
        self.V.copy_(right)
        self.delta.zero_()

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.V) * self.delta, self.U)


class SVFitConfig(PartsConfig):
    """SVFit: `R` trainable parameters for each target module.

    Attributes:
        rank: `R`, the number of singular values that train.
    """

    method = "svfit"
    order = 410
    default_learning_rate = 0.3
    free_sizes = ("rank",)
    unsupported_quantizations = QUANTIZATIONS
    part_class = SVFitPart
    rank: Size = 64
