"""SMoP, sparse mixture of prompts (Choi et al. 2023, EMNLP): one of several short prompts for each input.

p = softmax(W x̄ ⊙ (1 + ε)),  ε ~ N(0, σ²) in training               W: (N, H), no bias
P = p_k prompts_k,  k = argmax p                                     prompts: (N, T, H)
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder, Size, mean_input
from ptmoe.methods.routing import Router, RoutingStatistics, route


class SMoPConfig(PromptConfig):
    """Sparse mixture of prompts: `N·T·H + N·H` trained numbers.

    Attributes:
        num_experts: `N` prompts of `num_virtual_tokens` each.
        router_noise: σ of the multiplicative noise on the router's logits, in training only.
    """

    method: ClassVar[str] = "smop"
    num_virtual_tokens: Size = 20
    num_experts: Size = 2
    router_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def build(self, hidden_size: int) -> "SMoP":
        return SMoP(self, hidden_size)


class SMoP(PromptEncoder):
    config: SMoPConfig

    def __init__(self, config: SMoPConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.prompts = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, hidden_size))
        self.router = Router(hidden_size, config.num_experts, bias=False)
        self.statistics = RoutingStatistics()

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        logits = self.router(mean_input(input_embeds, input_mask), self.config.router_noise)
        routing = route(logits, selective=True, probationary=True)
        if self.training:
            self.statistics.observe(routing.probabilities)
        return Prompt(torch.einsum("bn,nth->bth", routing.gate, self.prompts), routing)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        experts, tokens, _ = self.prompts.shape
        if self.config.init == "text":  # one text: every prompt starts the same
            self.prompts.copy_(source.rows(self.config, tokens).expand_as(self.prompts))
        else:
            self.prompts.copy_(source.rows(self.config, experts * tokens).view_as(self.prompts))
        self.router.initialise(source.generator)

    def training_log(self) -> dict[str, float | list[float]]:
        return self.statistics.read()

    def expert_prompts(self) -> Tensor:
        return self.prompts
