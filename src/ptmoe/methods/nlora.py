"""NLoRA (Guo, Chang and Wu 2025, arXiv:2502.14482): LoRA with a matrix between A and B, started by Nyström's method.

W ≈ B₀ N₀ A₀                            A₀ = W[I, :]: (R, in), B₀ = W[:, J]: (out, R), N₀ = W[I, J]⁺: (R, R)
y = W x + (B N A - B₀ N₀ A₀) x          A, N, B trained from there

The product of some of W's rows, some of its columns and the pseudoinverse of where they cross is W itself on those
rows and columns, at a fraction of an SVD's cost. With `intermediate_only` N alone trains, the paper's IntTune.

The paper takes a block of W; here the R rows `I` and columns `J` are chosen by complete pivoting (each time those of
the largest number that is left), as a block may be nearly singular and its pseudoinverse huge. The start is taken off
again, in the form in which this package saves PiSSA, so that an untrained adapter leaves the base as it was. There is
no factor α / R: the start decides the scale.
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import QUANTIZATIONS, Size
from ptmoe.methods.parts import Part, PartsConfig, check_rank, decomposed_weight


class NLoRAPart(Part):
    """Tensors: `start_A (R, in)`, `start_N (R, R)`, `start_B (out, R)`, and of what trains `A`, `N`, `B`."""

    def __init__(self, config: "NLoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.rank = rank = config.rank
        check_rank(rank, in_features, out_features)
        self.trained = "N" if config.intermediate_only else "ANB"
        for name, shape in {"A": (rank, in_features), "N": (rank, rank), "B": (out_features, rank)}.items():
            self.register_buffer(f"start_{name}", torch.empty(shape))
            if name in self.trained:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        weight = decomposed_weight(module)
        rows, columns = crossing(weight, self.rank)
        inverse = torch.linalg.pinv(weight[rows][:, columns], rtol=1e-5)  # below are the roundings of lower ranks
        start = {"A": weight[rows], "N": inverse, "B": weight[:, columns]}
        for name, value in start.items():
            for tensor in [getattr(self, f"start_{name}"), *([getattr(self, name)] if name in self.trained else [])]:
                tensor.copy_(value)

    def product(self, x: Tensor, trained: str) -> Tensor:
        """`B N A x`, of the factors named in `trained` as they are now, of the others as they were at the start."""
        for name in "ANB":
            x = nn.functional.linear(x, getattr(self, name if name in trained else f"start_{name}"))
        return x

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a small difference of large numbers
            return self.product(x, self.trained) - self.product(x, "")


def crossing(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The rows and columns `(R,)` of a matrix that Gaussian elimination with complete pivoting takes first."""
    left, places = weight.clone(), []
    for _ in range(rank):
        place = int(left.abs().argmax())
        row, column = divmod(place, left.shape[1])
        places.append((row, column))
        pivot = left[row, column].clone()
        if pivot != 0:
            left -= torch.outer(left[:, column] / pivot, left[row])
        left[row], left[:, column] = 0, 0  # or rounding leaves something
    rows, columns = torch.tensor(places, device=weight.device).T
    return rows, columns


class NLoRAConfig(PartsConfig):
    """NLoRA: `R·(in + out + R)` trainable parameters for each target module, or `R²` with `intermediate_only`.

    Attributes:
        rank: `R`.
        intermediate_only: train `N` alone.
    """

    method = "nlora"
    order = 470
    default_learning_rate = 3e-3
    unsupported_quantizations = QUANTIZATIONS
    free_sizes = ("rank",)
    part_class = NLoRAPart
    rank: Size = 1
    intermediate_only: bool = False
