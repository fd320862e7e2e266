"""Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv:2402.02347), with `peft`'s optimizer: LoRA trained by
AdamW on preconditioned gradients.

y = W x + (α / R) B A x                        A: (R, in), B: (out, R)
∇A ← (Bᵀ B + λ I)⁻¹ ∇A,  ∇B ← ∇B (A Aᵀ + λ I)⁻¹

`PromptTrainer` uses the encoder's optimizer.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from ptmoe.methods.injected import Injected, OwnOptimizer
from ptmoe.methods.lora import LoRAVariantConfig


class Riemannian(OwnOptimizer):
    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer

        self.has_optimizer = True
        optimizer: torch.optim.Optimizer = create_riemannian_optimizer(
            self.peft_model, torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay
        )
        return optimizer


class RiemannianConfig(LoRAVariantConfig):
    """Riemannian preconditioned LoRA: `R·(in + out)` trainable parameters for each target module."""

    method: ClassVar[str] = "riemannian"
    order: ClassVar[int] = 170
    encoder_class: ClassVar[type[Injected]] = Riemannian
