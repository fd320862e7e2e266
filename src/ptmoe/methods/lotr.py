"""LoTR, low tensor rank adaptation (Bershatsky et al. 2024, arXiv:2402.01376): the changes of one kind of module in all
layers as one tensor, of which the layers share two factors and have a small core each.

y = W_l x + (α / R) U G_l V x            V: (R, in), U: (out, R), of all layers l; G_l: (R, R) of one

Modules are of one kind if their names differ in the layer's number alone and their shapes are the same, so `q_proj` and
the narrower `v_proj` have factors of their own. As chosen here V starts as a linear layer does, every G_l at the
identity and U at zero: the base is unchanged, and the first step is that of a LoRA that all layers share.
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import Size, fill_as_linear
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.parts import Part, PartsConfig, SharedByKind, check_rank


class Factors(nn.Module):
    """Tensors: `V (R, in)`, `U (out, R)`."""

    def __init__(self, rank: int, in_features: int, out_features: int) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.V = nn.Parameter(torch.empty(rank, in_features))
        self.U = nn.Parameter(torch.empty(out_features, rank))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        fill_as_linear(self.V, self.V.shape[1], generator)
        self.U.zero_()


class LoTRPart(Part):
    """Tensor: `G (R, R)`."""

    def __init__(self, config: "LoTRConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.G = nn.Parameter(torch.empty(config.rank, config.rank))
        self.scaling = config.scaling

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        nn.init.eye_(self.G)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        factors, _ = self.shared.of(self)
        for factor in (factors.V, self.G, factors.U):
            x = nn.functional.linear(x, factor.to(x.device))
        return self.scaling * x


class LoTRConfig(LowRankConfig, PartsConfig):
    """LoTR: `R·(in + out) + L·R²` trainable parameters for each kind of target module, which `L` layers have.

    Attributes:
        rank: `R`; higher than LoRA's, because layers share the factors.
    """

    method = "lotr"
    order = 500
    default_learning_rate = 1e-2
    rated_width = None
    part_class = LoTRPart
    rank: Size = 8

    def shared_by(self, features: dict[str, tuple[int, int]]) -> nn.Module:
        return SharedByKind(
            features, lambda in_features, out_features, _: Factors(self.rank, in_features, out_features)
        )
