"""Multitask prompt tuning (Wang et al. 2023, arXiv:2303.02861), with `peft`'s embedding: a shared prompt, multiplied
elementwise by a task's own low-rank matrix.

P = P* ⊙ (U V)                         P*: (T, H), U: (T, R), V: (R, H)

An adapter is for one task, as after the paper's transfer to a target task; its distillation from several source tasks
is not implemented. U and V start near zero, as in `peft`, and so does the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptmoe.methods.base import InitialEmbeddings, PromptConfig, PromptEncoder, Size


class MultitaskPromptTuningConfig(PromptConfig):
    """Multitask prompt tuning: `T·H + R·(T + H)` trainable parameters.

    Attributes:
        rank: `R`, of the task's matrix.
    """

    method = "multitask-prompt-tuning"
    order = 80
    rank: Size = 1

    def build(self, hidden_size: int) -> MultitaskPromptTuning:
        return MultitaskPromptTuning(self, hidden_size)


class MultitaskPromptTuning(PromptEncoder):
    """Tensors: those of `peft`'s embedding, for one task."""

    config: MultitaskPromptTuningConfig

    def __init__(self, config: MultitaskPromptTuningConfig, hidden_size: int) -> None:
        super().__init__(config)
        from peft import MultitaskPromptTuningConfig as PeftConfig
        from peft.tuners.multitask_prompt_tuning import MultitaskPromptEmbedding

        peft_config = PeftConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            token_dim=hidden_size,
            num_transformer_submodules=1,
            num_ranks=config.rank,
        )
        self.prompts = MultitaskPromptEmbedding(peft_config, None)

    def fixed_prompts(self) -> Tensor:
        tokens = torch.arange(self.config.num_virtual_tokens, device=self.prompts.embedding.weight.device)
        prompt: Tensor = self.prompts(tokens[None], torch.zeros_like(tokens[:1]))  # (1, T, H)
        return prompt

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompts.embedding.weight.copy_(source.rows(self.config, self.config.num_virtual_tokens))
