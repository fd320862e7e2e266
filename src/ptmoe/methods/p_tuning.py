"""P-tuning (Liu et al. 2021, arXiv:2103.10385), with `peft`'s prompt encoder: a small network computes the prompt.

P = W_3 ReLU(W_2 ReLU(W_1 E + b_1) + b_2) + b_3        E: (T, H), W_1: (h, H), W_2: (h, h), W_3: (H, h)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptmoe.methods.base import InitialEmbeddings, PromptEncoder, Size, VirtualTokensConfig


class PTuningConfig(VirtualTokensConfig):
    """P-tuning: `T·H + 2·h·H + h² + 2·h + H` trainable parameters, all of which are saved.

    Attributes:
        encoder_hidden_size: `h`, the width of the network.
    """

    method = "p-tuning"
    order = 60
    default_learning_rate = 1e-3
    encoder_hidden_size: Size = 128

    def build(self, hidden_size: int) -> PTuning:
        return PTuning(self, hidden_size)


class PTuning(PromptEncoder):
    """Tensors: those of `peft`'s prompt encoder."""

    config: PTuningConfig

    def __init__(self, config: PTuningConfig, hidden_size: int) -> None:
        super().__init__(config)
        from peft import PromptEncoderConfig
        from peft.tuners.p_tuning import PromptEncoder as Network

        self.network = Network(
            PromptEncoderConfig(
                num_virtual_tokens=config.num_virtual_tokens,
                token_dim=hidden_size,
                num_transformer_submodules=1,
                encoder_hidden_size=config.encoder_hidden_size,
            )
        )

    def fixed_prompts(self) -> Tensor:
        device = next(self.network.parameters()).device
        prompt: Tensor = self.network(torch.arange(self.config.num_virtual_tokens, device=device))
        return prompt[None]

    def initialise(self, source: InitialEmbeddings) -> None:
        """`peft` has initialised the network."""
