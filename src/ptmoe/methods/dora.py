"""DoRA (Liu et al. 2024, arXiv:2402.09353), from `peft`: LoRA of the weight's direction and a trainable magnitude.

y = m ⊙ (W + s B A) x / ‖W + s B A‖            A: (R, in), B: (out, R), m: (out,), s = α / R
"""

from typing import Any

from ptmoe.methods.injected import PeftConfig
from ptmoe.methods.lora import LoRAFamilyConfig


class DoRAConfig(LoRAFamilyConfig):
    """DoRA: `R·(in + out) + out` trainable parameters for each target module."""

    method = "dora"
    order = 120
    unsupported_quantizations = ("8bit",)  # on the CPU peft loses the scales of its layers

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(use_dora=True, **common)
