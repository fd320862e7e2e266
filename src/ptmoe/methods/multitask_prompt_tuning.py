"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861), with `peft`'s embedding: a shared prompt, multiplied
element by element by a task's own low-rank matrix.

P = P* ⊙ (U V)                         P*: (T, H), U: (T, R), V: (R, H)

An adapter is of one task, as after the paper's transfer to a target task; its distillation from several source tasks is
not here. U and V start near zero, as `peft` draws them, and so does the prompt.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder, Size


class MultitaskPromptTuningConfig(PromptConfig):
    """Multitask prompt tuning: `T·H + R·(T + H)` trained numbers.

    Attributes:
        rank: `R`, of the task's matrix.
    """

    method: ClassVar[str] = "multitask-prompt-tuning"
    rank: Size = 1

    def build(self, hidden_size: int) -> MultitaskPromptTuning:
        return MultitaskPromptTuning(self, hidden_size)


class MultitaskPromptTuning(PromptEncoder):
    config: MultitaskPromptTuningConfig

    def __init__(self, config: MultitaskPromptTuningConfig, hidden_size: int) -> None:
        super().__init__()
        from peft import MultitaskPromptTuningConfig as Form
        from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

        self.config = config
        form = Form(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=hidden_size,
            num_transformer_submodules=1,
            num_ranks=config.rank,
        )
        self.prompts = MultitaskPromptEmbedding(form, None)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        return Prompt(self.fixed_prompts().expand(len(input_embeds), -1, -1))

    def fixed_prompts(self) -> Tensor:
        tokens = torch.arange(self.config.num_virtual_tokens, device=self.prompts.embedding.weight.device)
        prompt: Tensor = self.prompts(tokens[None], torch.zeros_like(tokens[:1]))  # (1, T, H)
        return prompt

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompts.embedding.weight.copy_(source.rows(self.config, self.config.num_virtual_tokens))
