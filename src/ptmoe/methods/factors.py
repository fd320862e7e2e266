"""Low-rank factors of a prompt: the checks and the initialisation that DPT and PT-MoE share."""

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import InitialEmbeddings, PromptConfig


def check_rank(rank: int, num_virtual_tokens: int, hidden_size: int) -> None:
    """
    Raises:
        PtmoeError: `rank` exceeds min(T, H).
    """
    limit = min(num_virtual_tokens, hidden_size)
    if rank > limit:
        raise PtmoeError(
            f"rank {rank} exceeds min(T, H) = {limit}: lower rank"
            + (" or raise num_virtual_tokens" if num_virtual_tokens < hidden_size else "")
        )


def svd_factors(embeds: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`E (M, H)` into `U_R Σ_R^½ (M, R)` and `Σ_R^½ V_Rᵀ (R, H)`: the best rank-R product, evenly scaled."""
    left, values, right = torch.linalg.svd(embeds.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).float(), (root[:, None] * right[:rank]).float()


def random_factors(
    source: InitialEmbeddings, config: PromptConfig, shape: tuple[int, ...], rank: int, hidden: int
) -> tuple[Tensor, Tensor]:
    """Normal `A (*shape, R)` and `B (R, H)` whose product has the scale of the base's embeddings."""
    scale = source.rows(config.replace(init="random"), 64).std()
    factor_scale = (scale / rank**0.5) ** 0.5
    return factor_scale * source.normal(*shape, rank), factor_scale * source.normal(rank, hidden)
