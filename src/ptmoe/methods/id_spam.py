"""ID-SPAM (Muppidi, Nandy and Bandyopadhyay 2025, ACL, arXiv:2506.05629): a small network makes each input's prompt
from its embeddings.

A = softmax(E W_Q (E W_K)ᵀ / √a) E W_V         E: (n, H), the input's tokens; W_Q, W_K, W_V: (H, a)
c = mean of the rows of A                                                            (a,)
P = W_up ReLU(W_down c + b_down) + b_up        W_down: (r, a), W_up: (T·H, r), b_up: (T, H)

The paper puts P before the input of one layer of the base; here it is the first, where all prompts stand. Chosen here:
the width of the attention is a size of its own, and both layers of the network have a bias. That of W_up is the prompt
that all inputs share, and starts as `init` says; the rest starts as linear layers do.
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import (
    InitialEmbeddings,
    Prompt,
    PromptConfig,
    PromptEncoder,
    Size,
    fill_as_linear,
)
from ptmoe.methods.inputs import input_lengths


class IDSPAMConfig(PromptConfig):
    """ID-SPAM: `T·H·(r + 1) + 3·a·H + r·(a + 1)` trainable parameters.

    Attributes:
        bottleneck: `r`, the width of the network between its two layers.
        attention_size: `a`, the width of queries, keys and values.
    """

    method = "id-spam"
    order = 320
    free_sizes = ("num_virtual_tokens", "bottleneck", "attention_size")
    reads_input = True
    default_learning_rate = 0.01
    num_virtual_tokens: Size = 10
    bottleneck: Size = 2
    attention_size: Size = 3

    def build(self, hidden_size: int) -> "IDSPAM":
        return IDSPAM(self, hidden_size)


class IDSPAM(PromptEncoder):
    """Tensors: `query`, `key` and `value (a, H)`, `down (r, a)`, `down_bias (r,)`, `up (T, H, r)`, `prompt (T, H)`."""

    config: IDSPAMConfig

    def __init__(self, config: IDSPAMConfig, hidden_size: int) -> None:
        super().__init__(config)
        tokens, width, bottleneck = config.num_virtual_tokens, config.attention_size, config.bottleneck
        self.query = nn.Parameter(torch.empty(width, hidden_size))
        self.key = nn.Parameter(torch.empty(width, hidden_size))
        self.value = nn.Parameter(torch.empty(width, hidden_size))
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.down_bias = nn.Parameter(torch.empty(bottleneck))
        self.up = nn.Parameter(torch.empty(tokens, hidden_size, bottleneck))
        self.prompt = nn.Parameter(torch.empty(tokens, hidden_size))

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        lengths, real = input_lengths(input_mask), input_mask[..., None]
        embeds = input_embeds.detach().float().masked_fill(~real, 0)
        query, key, value = (embeds @ matrix.T for matrix in (self.query, self.key, self.value))  # (B, L, a)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, input_mask[:, None, :])
        mean = attended.masked_fill(~real, 0).sum(1) / lengths[:, None]  # (B, a)
        hidden = nn.functional.linear(mean, self.down, self.down_bias).relu()
        return Prompt(self.prompt + torch.einsum("br,thr->bth", hidden, self.up))

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompt.copy_(source.rows(self.config, len(self.prompt)))
        for parameter in (self.query, self.key, self.value, self.down, self.up):
            fill_as_linear(parameter, parameter.shape[-1], source.generator)
        fill_as_linear(self.down_bias, self.down.shape[1], source.generator)
