"""EVA (Paischer et al. 2024, arXiv:2410.07170), from `peft`: LoRA whose A starts at the directions in which the inputs
of each module vary most, over training batches.

X = U Σ Vᵀ,  A = V_Rᵀ,  B = 0                  X: (tokens, in), the module's inputs
y = W x + (α / R) B A x                        A: (R, in), B: (out, R)

The rank is the same in all modules: the paper's redistribution would change the number of trainable parameters.
"""

from typing import Any

from ptmoe.methods.base import Batches, PreTrainedModel
from ptmoe.methods.injected import ADAPTER, Injected, PeftConfig, model_inputs, peft_errors, require_inputs
from ptmoe.methods.lora import LoRAFamilyConfig


class EVAConfig(LoRAFamilyConfig):
    """EVA: `R·(in + out)` trainable parameters for each target module."""

    method = "eva"
    order = 140

    @property
    def needs_batches(self) -> bool:
        return True

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft import EvaConfig

        return self.lora_config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **common)

    def saved_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(**common)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        if batches is None:  # to count its parameters
            return super().encoder_for(base)
        was_training = base.training
        require_inputs(base, self.target_names(base), next(iter(batches)))
        encoder = super().encoder_for(base)
        from peft import initialize_lora_eva_weights

        peft_config = encoder.peft_model.peft_config[ADAPTER]
        targets = peft_config.target_modules
        try:
            with encoder.removed_on_failure(), peft_errors(self.method):
                initialize_lora_eva_weights(
                    encoder.peft_model,
                    list(batches),
                    forward_fn=lambda model, batch: base(**model_inputs(batch), use_cache=False),
                    show_progress_bar=False,
                )
        finally:
            base.train(was_training)  # peft's own wrapper is in training mode
        peft_config.target_modules = targets  # peft has listed every module by its full name
        return encoder
