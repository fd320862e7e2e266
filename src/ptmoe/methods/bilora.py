"""BiLoRA (Qiang et al. 2024, arXiv:2403.13037): LoRA as a pseudo-SVD, whose values and vectors are trained on two parts
of the data.

y = W x + (α / R) P diag(λ) Q x                 P: (out, R), λ: (R,), Q: (R, in)
loss + γ Σ (‖Pᵀ P - I‖² + ‖Q Qᵀ - I‖²)          over the target modules; Frobenius norms

A row of the first part of the data trains P and Q with λ fixed, one of the second λ with P and Q fixed. The paper nests
the two as levels of one optimisation; here the rows of a batch give each level its own gradient where both stand, and
one step follows both: the levels alternate without a second-order term. Which part a row belongs to is decided by a
hash of the embeddings of the tokens before its answer, whose bits are added as whole numbers: the same in every epoch,
batch and padding, and half of the rows each. So that a row can be told from its neighbour, a batch is trained with its
padding and its whole last layer. Left open and chosen here: λ starts at zero, so the base is as it was, and P and Q at
random orthonormal vectors.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, PreTrainedModel
from ptmoe.methods.lora import LowRankConfig
from ptmoe.methods.parts import Part, Parts, PartsConfig, check_rank

linear = nn.functional.linear


class BiLoRAPart(Part):
    """Tensors: `P (out, R)`, `values (R,)`, `Q (R, in)`."""

    trains_vectors: Tensor | None = None  # (B,), of the batch at hand

    def __init__(self, config: "BiLoRAConfig", in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        check_rank(config.rank, in_features, out_features)
        self.P = nn.Parameter(torch.empty(out_features, config.rank))
        self.values = nn.Parameter(torch.empty(config.rank))
        self.Q = nn.Parameter(torch.empty(config.rank, in_features))
        self.scaling, self.gamma = config.scaling, config.gamma

    @torch.no_grad()
    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        for parameter, shape in ((self.P, self.P.shape), (self.Q.T, self.Q.T.shape)):
            parameter.copy_(torch.linalg.qr(torch.randn(shape, generator=generator))[0])
        self.values.zero_()

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        P, values, Q = self.P, self.values, self.Q
        if self.trains_vectors is None or not (self.training and torch.is_grad_enabled()):  # it is the same number
            return self.scaling * linear(linear(x, Q) * values, P)
        if x.dim() < 3 or len(x) != len(self.trains_vectors):
            raise PtmoeError(
                f"bilora trains on the rows of a batch apart, and a module of {x.shape[-1]} inputs gets those of "
                f"{len(self.trains_vectors)} rows as {tuple(x.shape)}: name other modules in target_modules"
            )
        first = self.trains_vectors.to(x.device)
        vectors = linear(linear(x, Q) * values.detach(), P)
        alone = linear(linear(x, Q.detach()) * values, P.detach())
        return self.scaling * torch.where(first[:, None, None], vectors, alone)

    def penalty(self) -> Tensor:
        one = torch.eye(len(self.values), device=self.P.device)
        return self.gamma * ((self.P.T @ self.P - one).square().sum() + (self.Q @ self.Q.T - one).square().sum())


def in_first_part(input_embeds: Tensor, input_mask: Tensor) -> Tensor:
    """`(B,)`, whether each row is of the data's first part: a hash of its embeddings `(B, L, H)` where the mask is."""
    bits = input_embeds.detach().float().view(torch.int32).long().sum(2)  # (B, L)
    mixed = (bits * input_mask).sum(1) * 0x1E3779B97F4A7C15  # wraps; the product's high bits depend on all of it
    return (mixed >> 60) % 2 == 0


def divide(encoder: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Tell the parts which rows of the batch train their vectors."""
    assert isinstance(encoder, Parts)
    first = in_first_part(*arguments)
    for _, part in encoder.targets:
        vars(part)["trains_vectors"] = first


class BiLoRAConfig(LowRankConfig, PartsConfig):
    """BiLoRA: `R·(in + out + 1)` trainable parameters for each target module.

    Attributes:
        gamma: `γ`, the weight of the regulariser.
    """

    method = "bilora"
    order = 460
    default_learning_rate = 1e-2
    rated_width = None
    part_class = BiLoRAPart
    divides_rows = adds_loss = True
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Parts:
        encoder = super().encoder_for(base, batches)
        encoder.register_forward_pre_hook(divide)
        return encoder
