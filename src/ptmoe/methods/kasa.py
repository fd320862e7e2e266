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
from ptmoe.methods.injected import ADAPTER, Injected, PeftConfig
from ptmoe.methods.lora import LoRAFamilyConfig


class KaSA(Injected):
    rewrites_weights = True

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        if self.training:
            from peft.tuners.lora.variants import _kasa_layer_regularization_loss as regulariser

            of_paper = self.peft_model.peft_config[ADAPTER].kasa_config
            layers: list[Any] = [module for module in self.base.modules() if hasattr(module, "lora_diag")]
            losses = (regulariser(layer, ADAPTER, of_paper.beta, of_paper.gamma) for layer in layers)
            # peft's own sum of them takes all layers to be on one device.
            prompt.auxiliary_loss = sum(loss.to(input_embeds.device) for loss in losses)
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
