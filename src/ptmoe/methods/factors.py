"""Low-rank factors of a prompt: the checks and the initialisation that several methods share."""

import math

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import InitialEmbeddings, PromptConfig


def check_rank(rank: int, tokens: int, hidden_size: int, length: str = "num_virtual_tokens") -> None:
    """
    Args:
        length: the field that `tokens` comes from.

    Raises:
        PtmoeError: `rank` exceeds min(T, H).
    """
    limit = min(tokens, hidden_size)
    if rank > limit:
        raise PtmoeError(
            f"rank {rank} exceeds min(T, H) = {limit}: lower rank"
            + (f" or raise {length}" if tokens < hidden_size else "")
        )


def check_projection(rank: int, hidden_size: int, field: str = "rank") -> None:
    """
    Raises:
        PtmoeError: `rank` exceeds H, beyond which it adds no prompt that there is not already.
    """
    if rank > hidden_size:
        raise PtmoeError(f"{field} {rank} exceeds H = {hidden_size}: lower it")


def random_projection(seed: int, rank: int, hidden_size: int) -> Tensor:
    """`(R, H)` numbers from N(0, 1/R) in float32, the same on every machine.

    They are drawn in float64, which torch does by the textbook's formula on every processor (in float32 it is another
    one where there are vector instructions), and rounded, which hides the last bits of its logarithm and cosine.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank, hidden_size, generator=generator, dtype=torch.float64, device="cpu")
    return (drawn / math.sqrt(rank)).float()


def projected(rows: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """`E (M, H)` into `Z (M, R)` and `b (H,)`: the least squares of `Z P̃ + b`, with `b` at the mean of the rows."""
    shift = rows.mean(0)
    return (rows - shift) @ torch.linalg.pinv(projection), shift


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
