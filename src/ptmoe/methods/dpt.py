"""DPT, decomposed prompt tuning (Xiao et al. 2023, arXiv:2310.10094): the prompt as a low-rank product.

P = A B                            A: (T, R), B: (R, H)
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, PromptConfig, PromptEncoder, Size
from ptmoe.methods.factors import check_rank, random_factors, svd_factors


class DPTConfig(PromptConfig):
    """Decomposed prompt tuning: `R·(T + H)` trainable parameters.

    Attributes:
        rank: `R`, at most min(T, H).
    """

    method = "dpt"
    order = 30
    default_learning_rate = 0.1
    narrow_learning_rate = 0.03
    figure_color = ("#00805d", "#2fc79b")
    figure_marker = "^"
    free_sizes = ("rank", "num_virtual_tokens")
    rank: Size = 39

    def build(self, hidden_size: int) -> "DPT":
        return DPT(self, hidden_size)


class DPT(PromptEncoder):
    """Tensors: `A (T, R)` and `B (R, H)`."""

    config: DPTConfig

    def __init__(self, config: DPTConfig, hidden_size: int) -> None:
        super().__init__(config)
        check_rank(config.rank, config.num_virtual_tokens, hidden_size)
        self.A = nn.Parameter(torch.empty(config.num_virtual_tokens, config.rank))
        self.B = nn.Parameter(torch.empty(config.rank, hidden_size))

    def fixed_prompts(self) -> Tensor:
        return (self.A @ self.B)[None]

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        if self.config.init == "random":
            a, b = random_factors(source, self.config, (self.config.num_virtual_tokens,), *self.B.shape)
        else:
            a, b = svd_factors(source.rows(self.config, self.config.num_virtual_tokens), self.config.rank)
        self.A.copy_(a)
        self.B.copy_(b)
