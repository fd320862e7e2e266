"""Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv:2402.02347), with `peft`'s optimizer: LoRA trained by
AdamW on preconditioned gradients.

y = W x + (α / R) B A x                        A: (R, in), B: (out, R)
∇A ← (Bᵀ B + λ I)⁻¹ ∇A,  ∇B ← ∇B (A Aᵀ + λ I)⁻¹

`PromptTrainer` uses the encoder's optimizer.
"""

from typing import Any

import torch

from ptmoe.methods.injected import OwnOptimizer, PeftModel
from ptmoe.methods.lora import LoRAFamilyConfig


class RiemannianConfig(LoRAFamilyConfig):
    """Riemannian preconditioned LoRA: `R·(in + out)` trainable parameters for each target module."""

    method = "riemannian"
    order = 170
    encoder_class = OwnOptimizer

    def create_optimizer(self, model: PeftModel, **options: float) -> Any:
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, torch.optim.AdamW, **options)
