"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303), with `peft`'s optimizer: A keeps its random start and only B trains,
on gradients projected by A.

y = W x + (α / R) B A x                        A: (R, in), frozen; B: (out, R)

`PromptTrainer` uses the encoder's optimizer.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ptmoe.methods.injected import ADAPTER, Injected, OwnOptimizer
from ptmoe.methods.lora import LoRAVariantConfig


class LoRAFA(OwnOptimizer):
    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_lorafa_optimizer

        self.has_optimizer = True
        peft_config = self.peft_model.peft_config[ADAPTER]
        optimizer: torch.optim.Optimizer = create_lorafa_optimizer(
            self.peft_model,
            r=peft_config.r,
            lora_alpha=peft_config.lora_alpha,
            lr=learning_rate,
            weight_decay=weight_decay,
        )
        return optimizer


class LoRAFAConfig(LoRAVariantConfig):
    """LoRA-FA: `R·out` trainable parameters for each target module."""

    method: ClassVar[str] = "lora-fa"
    order: ClassVar[int] = 180
    frozen: ClassVar[str | None] = "lora_A"
    encoder_class: ClassVar[type[Injected]] = LoRAFA
