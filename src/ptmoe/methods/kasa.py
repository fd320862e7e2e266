"""KaSA (Wang et al. 2024, arXiv:2412.06071), from `peft`: LoRA in the form of an SVD, in place of the weight's smallest
singular components, with the paper's two regularisers added to the loss.

W' = W without its R smallest singular components
y = (W' + s B diag(δ) A) x                     A: (R, in), B: (out, R), δ: (R,), s = α / R

The target modules' own weights are replaced by `W'` before training, so they cannot be quantized; `disable_adapter` and
`delete_adapter` restore them to the bit from a copy.
"""

from typing import Any

from torch import Tensor

from ptmoe.methods.base import QUANTIZATIONS, Prompt
from ptmoe.methods.injected import Injected, PeftConfig
from ptmoe.methods.lora import LoRAFamilyConfig


class KaSA(Injected):
    rewrites_weights = True

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        if self.training:
            prompt.auxiliary_loss = self.peft_model.base_model._get_kasa_loss()
        return prompt


class KaSAConfig(LoRAFamilyConfig):
    """KaSA: `R·(in + out + 1)` trainable parameters for each target module."""

    method = "kasa"
    order = 160
    unsupported_quantizations = QUANTIZATIONS
    encoder_class = KaSA
    adds_loss = True

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft import KasaConfig

        return self.lora_config(kasa_config=KasaConfig(), **common)
