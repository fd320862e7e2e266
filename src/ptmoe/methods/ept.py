"""EPT, efficient prompt tuning (Lan et al. 2024, arXiv:2405.11464): a short prompt and two low-rank matrices, fused,
and a gate over several embedding spaces.

L = A B                                        A: (M, R), B: (R, H)                  (M, H)
F = S + softmax(S Lᵀ / √H) L                   S: (T, H), the short prompt           (T, H)
g_t = softmax(G f_t)                           G: (K, H), f_t a row of F             (K,)
p_t = f_t + Σ_k g_tk f_t D_k U_k               D_k: (H, q), U_k: (q, H)              (H,)

The paper decomposes a long prompt into the short one and the product A B, fuses both by attention, projects the result
into several spaces and weighs those by a gate. Chosen here, where its abstract leaves it open: the attention has no
weights of its own; a space is a projection of rank q that is added, so that K = 0 would be the fused prompt; the gate
reads each virtual token, so every input has the same prompt. The T + M initial embeddings are those of the long prompt:
S starts at the first T, A B at the best product for the others, D and G as linear layers do, and U at zero.
"""

import math

import torch
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, PromptConfig, PromptEncoder, Size, fill_as_linear
from ptmoe.methods.factors import check_projection, check_rank, svd_factors


class EPTConfig(PromptConfig):
    """Efficient prompt tuning: `T·H + R·(M + H) + K·H·(1 + 2·q)` trainable parameters.

    Attributes:
        num_virtual_tokens: `T`, the length of the short prompt, which is all that the base reads.
        num_decomposed_tokens: `M`, the tokens of the long prompt that the low-rank matrices stand for.
        rank: `R`, of these, at most min(M, H).
        num_spaces: `K`.
        space_rank: `q`, of each space's projection, at most H.
    """

    method = "ept"
    order = 330
    free_sizes = ("num_virtual_tokens", "rank")
    num_virtual_tokens: Size = 28
    num_decomposed_tokens: Size = 40
    rank: Size = 4
    num_spaces: Size = 2
    space_rank: Size = 1

    def build(self, hidden_size: int) -> "EPT":
        return EPT(self, hidden_size)


class EPT(PromptEncoder):
    """Tensors: `prompt (T, H)`, `A (M, R)`, `B (R, H)`, `gate (K, H)`, `down (K, H, q)`, `up (K, q, H)`."""

    config: EPTConfig

    def __init__(self, config: EPTConfig, hidden_size: int) -> None:
        super().__init__(config)
        long, spaces, width = config.num_decomposed_tokens, config.num_spaces, config.space_rank
        check_rank(config.rank, long, hidden_size, "num_decomposed_tokens")
        check_projection(width, hidden_size, "space_rank")
        self.prompt = nn.Parameter(torch.empty(config.num_virtual_tokens, hidden_size))
        self.A = nn.Parameter(torch.empty(long, config.rank))
        self.B = nn.Parameter(torch.empty(config.rank, hidden_size))
        self.gate = nn.Parameter(torch.empty(spaces, hidden_size))
        self.down = nn.Parameter(torch.empty(spaces, hidden_size, width))
        self.up = nn.Parameter(torch.empty(spaces, width, hidden_size))

    def fixed_prompts(self) -> Tensor:
        knowledge = self.A @ self.B  # (M, H)
        weights = (self.prompt @ knowledge.T / math.sqrt(self.prompt.shape[1])).softmax(1)  # (T, M)
        fused = self.prompt + weights @ knowledge
        gate = (fused @ self.gate.T).softmax(1)  # (T, K)
        return (fused + torch.einsum("tk,th,khq,kqd->td", gate, fused, self.down, self.up))[None]

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        short, long = len(self.prompt), len(self.A)
        rows = source.rows(self.config, short + long)
        self.prompt.copy_(rows[:short])
        a, b = svd_factors(rows[short:], self.config.rank)
        self.A.copy_(a)
        self.B.copy_(b)
        for parameter in (self.gate, self.down):
            fill_as_linear(parameter, self.prompt.shape[1], source.generator)
        self.up.zero_()
