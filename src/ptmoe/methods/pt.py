"""PT, prompt tuning (Lester et al. 2021, arXiv:2104.08691): one trainable prompt for every input.

P = prompt                         prompt: (T, H)
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import InitialEmbeddings, PromptConfig, PromptEncoder


class PTConfig(PromptConfig):
    """Prompt tuning: `T·H` trainable parameters. See `PromptConfig`."""

    method = "pt"
    order = 20
    default_learning_rate = 0.1
    narrow_learning_rate = 0.03
    figure_color = ("#d55e00", "#f08a3c")
    figure_marker = "s"

    def build(self, hidden_size: int) -> "PT":
        return PT(self, hidden_size)


class PT(PromptEncoder):
    """Tensors: `prompt (T, H)`."""

    config: PTConfig

    def __init__(self, config: PTConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.empty(config.num_virtual_tokens, hidden_size))

    def fixed_prompts(self) -> Tensor:
        return self.prompt[None]

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompt.copy_(source.rows(self.config, self.config.num_virtual_tokens))
