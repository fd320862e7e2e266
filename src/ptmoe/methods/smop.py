"""SMoP, sparse mixture of prompts (Choi et al. 2023, EMNLP): one of several short prompts for each input.

p = softmax(W x̄ ⊙ (1 + ε)),  ε ~ N(0, σ²) in training               W: (N, H), no bias
P = p_k prompts_k,  k = argmax p                                     prompts: (N, T, H)
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, Prompt, Size
from ptmoe.methods.routing import RoutedConfig, RoutedEncoder, Router


class SMoPConfig(RoutedConfig):
    """Sparse mixture of prompts: `N·T·H + N·H` trainable parameters. See `RoutedConfig`.

    Attributes:
        num_virtual_tokens: `T`, the length of each of the `num_experts` prompts.
    """

    method = "smop"
    order = 40
    figure_color = ("#b0568a", "#e092be")
    figure_marker = "D"
    router_bias = False
    num_virtual_tokens: Size = 20

    def build(self, hidden_size: int) -> "SMoP":
        return SMoP(self, hidden_size)


class SMoP(RoutedEncoder):
    """Tensors: `prompts (N, T, H)`, `router.weight (N, H)`."""

    config: SMoPConfig

    def __init__(self, config: SMoPConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.prompts = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, hidden_size))
        self.router = Router(hidden_size, config.num_experts, bias=False)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        routing = self.route(input_embeds, input_mask)
        return Prompt(torch.einsum("bn,nth->bth", routing.gate, self.prompts), routing)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        experts, tokens, _ = self.prompts.shape
        if self.config.init == "text":  # one text: every prompt starts the same
            self.prompts.copy_(source.rows(self.config, tokens).expand_as(self.prompts))
        else:
            self.prompts.copy_(source.rows(self.config, experts * tokens).view_as(self.prompts))
        self.router.initialise(source.generator)

    def expert_prompts(self) -> Tensor:
        return self.prompts
