"""SoKA (Chong & Qu 2025, arXiv:2506.15251): the weight as a sum of Kronecker products, whose leading terms are trained.

W = Σ_k σ_k U_k ⊗ V_k              U_k: (m, n), V_k: (p, q), out = m·p, in = n·q; from the SVD of W's blocks as rows
y = W x + Σ_k^R (C_k ⊗ D_k - C°_k ⊗ D°_k) x            C°_k = σ_k^½ U_k and D°_k = σ_k^½ V_k, where C and D start

The difference to the start, which is kept frozen, leaves the base as it was. The paper chooses the rank by an energy
threshold and by the elbow of the spectrum. Here that is `energy`: the fewest terms with this part of Σ σ², or those up
to the elbow, where the spectrum is farthest below the straight line between its ends, if fewer. The shapes are chosen
here: the divisors of `out` and `in` next to their roots, the smaller first in m and p, the larger in n and q.
"""

from math import isqrt
from typing import Annotated, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import QUANTIZATIONS, Batches, PreTrainedModel, Size
from ptmoe.methods.parts import Part, Parts, PartsConfig, leading


def largest_divisor_up_to_root(number: int) -> int:
    return next(one for one in range(isqrt(number), 0, -1) if number % one == 0)


class SoKAPart(Part):
    """Tensors: `C (R, m, n)`, `D (R, p, q)`; frozen `C_start`, `D_start`, of the same shapes."""

    C_start: Tensor
    D_start: Tensor

    def __init__(self, config: "SoKAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        m, q = largest_divisor_up_to_root(out_features), largest_divisor_up_to_root(in_features)
        self.blocks, self.block = (m, in_features // q), (out_features // m, q)
        self.most = min(m * self.blocks[1], q * self.block[0])
        if config.rank > self.most:
            whole = f"the {self.most} Kronecker products of a {in_features} × {out_features} module"
            raise PtmoeError(f"rank {config.rank} exceeds {whole}: lower it")
        self.allocate(config.rank)

    def allocate(self, rank: int) -> None:
        shapes = (rank, *self.blocks), (rank, *self.block)
        self.C, self.D = (nn.Parameter(torch.empty(shape)) for shape in shapes)
        for name, shape in zip(("C_start", "D_start"), shapes, strict=True):
            self.register_buffer(name, torch.empty(shape))

    def rank_by(self, energy: float, module: nn.Module) -> int:
        values = leading(module, self.most, self.blocks)[1]
        energies = values.square().cumsum(0)
        enough = int((energies < energy * energies[-1]).sum()) + 1
        line = torch.linspace(float(values[0]), float(values[-1]), len(values), device=values.device)
        elbow = int((line - values).argmax()) + 1
        return min(enough, elbow, len(self.C))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        left, values, right = leading(module, len(self.C), self.blocks)
        self.C_start.copy_((left * values.sqrt()).T.view_as(self.C))
        self.D_start.copy_((values.sqrt()[:, None] * right).view_as(self.D))
        self.C.copy_(self.C_start)
        self.D.copy_(self.D_start)

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        x = x.unflatten(-1, (self.blocks[1], self.block[1]))  # (…, n, q)
        with torch.autocast(x.device.type, enabled=False):  # a small difference of large numbers
            return _kronecker(x, self.C, self.D) - _kronecker(x, self.C_start, self.D_start)


def _kronecker(x: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """`Σ_k (C_k ⊗ D_k) x`, `(…, m·p)`, of `x (…, n, q)`."""
    return torch.einsum("...nq,kmn,kpq->...mp", x, C, D).flatten(-2)


class SoKAConfig(PartsConfig):
    """SoKA: `R·(m·n + p·q)` trainable parameters for each target module.

    Attributes:
        rank: `R`, the number of Kronecker products; with `energy`, the most of a module.
        energy: the part of Σ σ² that a module's terms have together, if its spectrum has no elbow before.
        ranks: with `energy`, what it chose for each module, from the first layer to the last; a saved adapter has them.
    """

    method = "soka"
    order = 430
    default_learning_rate = 1e-2
    free_sizes = ("rank",)
    unsupported_quantizations = QUANTIZATIONS
    part_class = SoKAPart
    rank: Size = 1
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    ranks: list[Annotated[int, Field(ge=1)]] | None = None

    @model_validator(mode="after")
    def _ranks_by_energy(self) -> Self:
        if self.ranks is not None and (self.energy is None or max(self.ranks, default=1) > self.rank):
            raise ValueError(f"ranks={self.ranks}: needs energy, which chooses them, and none above rank={self.rank}")
        return self

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Parts:
        encoder = super().encoder_for(base, batches)
        ranks = self.ranks
        if self.energy is None:
            return encoder
        with encoder.removed_on_failure():
            if ranks is None and base.device.type != "meta":
                ranks = [cast(SoKAPart, part).rank_by(self.energy, module) for module, part in encoder.targets]
            if ranks is None or len(ranks) != len(encoder.targets):
                raise PtmoeError(
                    f"soka with energy={self.energy} has a rank for each of {len(encoder.targets)} modules, read off "
                    f"their weights, and {'no weights are here' if ranks is None else f'ranks has {len(ranks)}'}: "
                    "leave energy out where parameters are counted or fitted to a budget"
                )
        for (_, part), rank in zip(encoder.targets, ranks, strict=True):
            cast(SoKAPart, part).allocate(rank)
        encoder.config = encoder.config.replace(ranks=ranks)
        return encoder
