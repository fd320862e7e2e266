"""MEPT, mixture of expert prompt tuning (Zeng et al. 2025, EMNLP, arXiv:2509.00996), in prefix form: each layer has its
own experts, and a router that chooses one of them for each input.

p^l = softmax(W^l x̂),  x̂ = LayerNorm(mean of E(x_t) over the input's tokens)    W^l: (N, H), no bias      (N,)
K^l = [p^l_k K^l_k ; K_x],  V^l = [p^l_k V^l_k ; V_x],  k = argmax p^l          K^l_i, V^l_i: (heads, T, d)

In the paper an expert is T vectors of the hidden size, from which a layer computes keys and values, and a layer's
router reads the hidden states of its input. Chosen here: an expert is the keys and values themselves, as in
`prefix-tuning`, and all routers read the input's embeddings (the normalisation has no parameters), so that routing is
known before the base runs, sees no answer, and is held for a whole generation. Routing is per layer, so there is no
gate of an *input* to report. Experts start normal, as a prefix does, and routers as a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptmoe.methods.base import (
    Batches,
    InitialEmbeddings,
    MethodConfig,
    PreTrainedModel,
    Prompt,
    PromptEncoder,
    Size,
    fill_as_linear,
)
from ptmoe.methods.inputs import mean_input
from ptmoe.methods.prefix_tuning import prefix_config
from ptmoe.methods.routing import gate


class MEPTConfig(MethodConfig):
    """Mixture of expert prompts: `layers·N·(2·T·heads·d + H)` trainable parameters, `heads` being those of keys and
    values.

    Attributes:
        num_virtual_tokens: `T`, the length of each expert's prefix.
        num_experts: `N`, of each layer.
    """

    method = "mept"
    order = 310
    free_sizes = ("num_virtual_tokens", "num_experts")
    fills_cache = True
    reads_input = True
    default_learning_rate = 0.01
    num_virtual_tokens: Size = 10
    num_experts: Size = 2

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> MEPT:
        return MEPT(self, base)


class MEPT(PromptEncoder):
    """Tensors: `experts (layers, N, 2, heads, T, d)`, keys and values, and `router (layers, N, H)`."""

    config: MEPTConfig

    def __init__(self, config: MEPTConfig, base: PreTrainedModel) -> None:
        super().__init__(config)
        of_peft = prefix_config(config, base)
        layers, heads, experts = of_peft.num_layers, of_peft.num_attention_heads, config.num_experts
        size = heads, config.num_virtual_tokens, of_peft.token_dim // heads
        self.experts = nn.Parameter(torch.empty(layers, experts, 2, *size))
        self.router = nn.Parameter(torch.empty(layers, experts, base.get_input_embeddings().weight.shape[1]))

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        mean = mean_input(input_embeds, input_mask)
        normal = nn.functional.layer_norm(mean, mean.shape[1:])
        # No matrix product, which rounds otherwise in a batch: a row's experts are those that it has alone.
        probabilities = (self.router * normal[:, None, None]).sum(-1).softmax(-1)  # (B, layers, N)
        chosen = gate(probabilities.flatten(0, 1), selective=True, probationary=True).view_as(probabilities)
        cache = torch.einsum("bln,lnchtd->lcbhtd", chosen, self.experts)  # (layers, 2, B, heads, T, d)
        return Prompt(cache.new_zeros(len(mean), 0, mean.shape[1]), cache=cache)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.experts.copy_(source.normal(*self.experts.shape))
        fill_as_linear(self.router, self.router.shape[2], source.generator)
