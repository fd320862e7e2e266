"""DoRA (Liu et al. 2024, arXiv:2402.09353), from `peft`: LoRA of the weight's direction and a trainable magnitude.

y = m ⊙ (W + s B A) x / ‖W + s B A‖            A: (R, in), B: (out, R), m: (out,), s = α / R
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ptmoe.methods.lora import LoRAVariantConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class DoRAConfig(LoRAVariantConfig):
    """DoRA: `R·(in + out) + out` trainable parameters for each target module."""

    method: ClassVar[str] = "dora"
    order: ClassVar[int] = 120
    unsupported_quantizations: ClassVar[tuple[str, ...]] = ("8bit",)  # on the CPU peft loses the scales of its layers

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(use_dora=True, **common)
