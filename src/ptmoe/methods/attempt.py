"""ATTEMPT (Asai et al. 2022, arXiv:2205.11961): a target prompt plus an attention over frozen source prompts.

    x̂   = max over the input's tokens of E(x_t)                          (H,)
    h   = LayerNorm(W_up SiLU(W_down x̂))           W_down: (r, H), W_up: (H, r)
    a   = softmax_j(p̂_j · h / τ),  τ = e·H,  p̂_j = max over tokens of prompt j   (S + 1,)
    P   = target + Σ_j a_j prompt_j                 over the S sources and the target, (T, H)

The sources are prompts trained on other tasks (`source_prompts`: PT adapter folders), or embeddings of random tokens
where none are given. The published LayerNorm has trainable gains; here it has no parameters, so that a bottleneck of 2
matches the published parameter count.
"""

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder, Routing, Size, fill_as_linear


class ATTEMPTConfig(PromptConfig):
    """ATTEMPT: `T·H + 2·r·H` trainable parameters and `S·T·H` frozen ones.

    Attributes:
        num_sources: `S`, the number of frozen source prompts.
        bottleneck: `r`, the width of the attention sub-network.
        source_prompts: PT adapter folders to read the sources from, one for each; by default the sources are embeddings
            of random tokens of the vocabulary.
    """

    method = "attempt"
    order = 50
    figure_color = ("#8a6d00", "#e3c13b")
    figure_marker = "v"
    free_sizes = ("num_virtual_tokens", "bottleneck")
    routes = reads_input = True
    num_sources: Size = 2
    bottleneck: Size = 2
    source_prompts: list[str] = []

    @model_validator(mode="after")
    def _one_folder_for_each_source(self) -> Self:
        if self.source_prompts and len(self.source_prompts) != self.num_sources:
            raise ValueError(
                f"source_prompts names {len(self.source_prompts)} folders for num_sources={self.num_sources}: "
                "give one for each"
            )
        return self

    @property
    def soft_gate(self) -> bool:
        return True

    def build(self, hidden_size: int) -> "ATTEMPT":
        return ATTEMPT(self, hidden_size)


class ATTEMPT(PromptEncoder):
    """Tensors: `prompt (T, H)`, `down (r, H)`, `up (H, r)`, and the buffer `source_prompts (S, T, H)`."""

    config: ATTEMPTConfig

    def __init__(self, config: ATTEMPTConfig, hidden_size: int) -> None:
        super().__init__(config)
        tokens = config.num_virtual_tokens
        self.prompt = nn.Parameter(torch.empty(tokens, hidden_size))
        self.down = nn.Parameter(torch.empty(config.bottleneck, hidden_size))
        self.up = nn.Parameter(torch.empty(hidden_size, config.bottleneck))
        self.register_buffer("source_prompts", torch.empty(config.num_sources, tokens, hidden_size))
        self.source_prompts: Tensor

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        pooled = input_embeds.detach().float().masked_fill(~input_mask[..., None], -torch.inf).amax(1)  # (B, H)
        if torch.isinf(pooled).any():
            raise ValueError(
                "a row has no input token to attend from: set its prompt's labels to -100 or pass input_mask"
            )
        hidden = nn.functional.silu(pooled @ self.down.T) @ self.up.T
        query = nn.functional.layer_norm(hidden, hidden.shape[1:])
        prompts = self.expert_prompts()
        temperature = torch.e * query.shape[1]
        weights = (query @ prompts.amax(1).T / temperature).softmax(1)  # (B, S + 1)
        embeds = self.prompt + torch.einsum("bs,sth->bth", weights, prompts)
        return Prompt(embeds, Routing(weights, weights))

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        sources, tokens, hidden = self.source_prompts.shape
        self.prompt.copy_(source.rows(self.config, tokens))
        for index, folder in enumerate(self.config.source_prompts):
            assert source.read_prompt is not None
            prompt = source.read_prompt(folder)
            if prompt.shape != self.prompt.shape:
                needed, found = tuple(self.prompt.shape), tuple(prompt.shape)
                raise PtmoeError(f"source prompt {folder}: needs a pt adapter of shape {needed}, has shape {found}")
            self.source_prompts[index] = prompt
        if not self.config.source_prompts:
            vocabulary = self.config.replace(init="vocabulary", init_text=None)
            self.source_prompts.copy_(source.rows(vocabulary, sources * tokens).view_as(self.source_prompts))
        for parameter in (self.down, self.up):
            fill_as_linear(parameter, hidden, source.generator)

    def expert_prompts(self) -> Tensor:
        """`(S + 1, T, H)`: the sources, then the target."""
        return torch.cat([self.source_prompts, self.prompt[None]])
