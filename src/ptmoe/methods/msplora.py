"""MSPLoRA, multi-scale pyramid LoRA (Zhao, Yu and Yang 2025, arXiv:2503.21838): a LoRA that all layers share, one for
each group of neighbouring layers, and one for each layer, of falling rank.

y = W_l x + (α / R) (B A + B_g A_g + B_l A_l) x      A: (R, in), B: (out, R) of all layers
                                                     A_g, B_g of rank R/2, of the group g that layer l is in
                                                     A_l, B_l of rank R/4, of the layer

A kind of module (`q_proj`, `v_proj`, …) has a pyramid of its own, as shapes differ. What the paper leaves open or was
not certain here: the groups are of equal numbers of layers, ranks are halved from level to level and rounded down, to 1
at least, and one factor α / R is for all. As in LoRA each A starts as a linear layer does and each B at zero.
"""

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Size, fill_as_linear
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.parts import Part, PartsConfig, SharedByKind, check_rank


class LowRankPairs(nn.Module):
    """`N` products of low rank. Tensors: `A (N, R, in)`, `B (N, out, R)`."""

    def __init__(self, count: int, rank: int, in_features: int, out_features: int) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.A = nn.Parameter(torch.empty(count, rank, in_features))
        self.B = nn.Parameter(torch.empty(count, out_features, rank))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        fill_as_linear(self.A, self.A.shape[2], generator)
        self.B.zero_()

    def forward(self, x: Tensor, index: int) -> Tensor:
        A, B = self.A[index].to(x.device), self.B[index].to(x.device)
        return nn.functional.linear(nn.functional.linear(x, A), B)


class Levels(nn.Module):
    """What the layers of one kind of module share. Tensors: those of `all`, one pair, and of `groups`, `G` of them."""

    def __init__(self, config: "MSPLoRAConfig", in_features: int, out_features: int, layers: int) -> None:
        super().__init__()
        if config.num_groups > layers:
            raise PtmoeError(
                f"num_groups {config.num_groups} exceeds the {layers} layers that have one kind of module of "
                f"{in_features} × {out_features}: lower it"
            )
        self.layers = layers
        self.all = LowRankPairs(1, config.rank, in_features, out_features)
        self.groups = LowRankPairs(config.num_groups, max(1, config.rank // 2), in_features, out_features)

    def initialise(self, generator: torch.Generator) -> None:
        self.all.initialise(generator)
        self.groups.initialise(generator)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        group = layer * len(self.groups.A) // self.layers
        output: Tensor = self.all(x, 0) + self.groups(x, group)
        return output


class MSPLoRAPart(Part):
    """Tensors: `own.A (1, R/4, in)`, `own.B (1, out, R/4)`."""

    def __init__(self, config: "MSPLoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.own = LowRankPairs(1, max(1, config.rank // 4), in_features, out_features)
        self.scaling = config.scaling

    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        self.own.initialise(generator)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        levels, layer = self.shared.of(self)
        added: Tensor = self.scaling * (levels(x, layer) + self.own(x, 0))
        return added


class MSPLoRAConfig(LowRankConfig, PartsConfig):
    """MSPLoRA: `(in + out)·(R + G·max(1, R/2) + L·max(1, R/4))` trainable parameters for each kind of target module,
    which `L` layers have; quotients are rounded down.

    Attributes:
        rank: `R`, of what all layers share; groups have half of it and layers a quarter.
        num_groups: `G`, of neighbouring layers; at most as many as there are layers.
    """

    method = "msplora"
    order = 490
    part_class = MSPLoRAPart
    rank: Size = 4
    num_groups: Size = 2

    def shared_by(self, features: dict[str, tuple[int, int]]) -> nn.Module:
        return SharedByKind(features, lambda *shape: Levels(self, *shape))
