"""ULPT, ultra-low-dimensional prompt tuning (Wu, Hao and Mou 2025, arXiv:2502.04501): a prompt of few dimensions,
projected up by a frozen random matrix.

P = (Z P̃) ⊙ s + b                  Z: (T, R), P̃: (R, H), s, b: (H,)          P̃_ij ~ N(0, 1/R), frozen

P̃ comes from `projection_seed` whenever it is needed (`random_projection`), so that the adapter folder holds what is
trained alone. Chosen here, so that the prompt starts as `init` says: s = 1, and Z and b at the least squares of Z P̃ + b
to the initial embeddings, with b at their mean.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, PromptConfig, PromptEncoder, Size
from ptmoe.methods.factors import check_projection, projected, random_projection


class ULPTConfig(PromptConfig):
    """Ultra-low-dimensional prompt tuning: `T·R + 2·H` trainable parameters.

    Attributes:
        rank: `R`, the dimensions that are trained, at most H.
        projection_seed: decides the frozen random matrix.
    """

    method = "ulpt"
    order = 300
    free_sizes = ("rank", "num_virtual_tokens")
    default_learning_rate = 0.01
    rank: Size = 64
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def build(self, hidden_size: int) -> "ULPT":
        return ULPT(self, hidden_size)


class ULPT(PromptEncoder):
    """Tensors: `Z (T, R)`, `scale (H,)` and `shift (H,)`. `projection (R, H)` is not saved."""

    config: ULPTConfig

    def __init__(self, config: ULPTConfig, hidden_size: int) -> None:
        super().__init__(config)
        check_projection(config.rank, hidden_size)
        self.Z = nn.Parameter(torch.empty(config.num_virtual_tokens, config.rank))
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.shift = nn.Parameter(torch.empty(hidden_size))
        self.register_buffer("projection", torch.empty(config.rank, hidden_size), persistent=False)
        self.projection: Tensor

    def fixed_prompts(self) -> Tensor:
        return (self.Z @ self.projection * self.scale + self.shift)[None]

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        projection = random_projection(self.config.projection_seed, *self.projection.shape)
        z, shift = projected(source.rows(self.config, len(self.Z)), projection)
        self.projection.copy_(projection)
        self.Z.copy_(z)
        self.scale.fill_(1)
        self.shift.copy_(shift)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.projection.copy_(random_projection(self.config.projection_seed, *self.projection.shape))
