"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303), with `peft`'s optimizer: A keeps its random start and only B trains,
on gradients projected by A.

y = W x + (α / R) B A x                        A: (R, in), frozen; B: (out, R)

`PromptTrainer` uses the encoder's optimizer.
"""

from typing import Any

from ptmoe.methods.injected import ADAPTER, OwnOptimizer, PeftModel
from ptmoe.methods.lora import LoRAFamilyConfig


class LoRAFAConfig(LoRAFamilyConfig):
    """LoRA-FA: `R·out` trainable parameters for each target module."""

    method = "lora-fa"
    order = 180
    default_learning_rate = 0.1
    rated_width = None
    frozen = "lora_A"
    encoder_class = OwnOptimizer

    def create_optimizer(self, model: PeftModel, **options: float) -> Any:
        from peft.optimizers import create_lorafa_optimizer

        lora = model.peft_config[ADAPTER]
        return create_lorafa_optimizer(model, r=lora.r, lora_alpha=lora.lora_alpha, **options)
