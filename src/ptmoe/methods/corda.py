"""CorDA (Yang et al. 2024, arXiv:2406.05223), from `peft`: as PiSSA, with the components of the weight times the
covariance of the module's inputs over training batches.

W C = U Σ Vᵀ,  s B₀ A₀ = U_R Σ_R V_Rᵀ C⁻¹,  W' = W - s B₀ A₀          C = Xᵀ X: (in, in), s = α / R
y = (W' + s B A) x = (W + s (B A - B₀ A₀)) x                           A: (R, in), B: (out, R)
"""

from typing import Any

from ptmoe.methods.base import Batches, PreTrainedModel, quantization_of
from ptmoe.methods.injected import Injected, PeftConfig, model_inputs, peft_errors, require_inputs
from ptmoe.methods.pissa import PiSSAConfig
from ptmoe.methods.weights import modules_named


class CorDAConfig(PiSSAConfig):
    """CorDA: `R·(in + out)` trainable parameters for each target module. Saved as PiSSA is."""

    method = "corda"
    order = 150

    @property
    def needs_batches(self) -> bool:
        return True

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft.tuners.lora.config import CordaConfig

        return self.lora_config(init_lora_weights="corda", corda_config=CordaConfig(), **common)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self.resolved(base)
        if batches is None:  # to count its parameters
            return self.encoder_class(config, base, self.lora_config(**common))
        require_inputs(base, common["target_modules"], next(iter(batches)))
        from peft.tuners.lora.corda import preprocess_corda

        peft_config = self.initial_peft_config(**common)

        def run() -> None:
            for batch in batches:
                inputs = model_inputs(batch)
                for ids, mask in zip(*inputs.values(), strict=True):  # peft needs single rows, without padding
                    base(input_ids=ids[mask.bool()][None].to(base.device), use_cache=False)

        was_training = base.training
        targets = modules_named(base, common["target_modules"]).values()
        before = [(module, vars(module).copy(), module._forward_hooks.copy()) for module in targets]
        try:
            with peft_errors(self.method):
                preprocess_corda(base, peft_config, run_model=run)
        except BaseException:  # its hooks and sums are still there
            for module, attributes, hooks in before:
                for name in vars(module).keys() - attributes.keys():
                    delattr(module, name)
                module._forward_hooks.clear()
                module._forward_hooks.update(hooks)
            raise
        finally:
            base.train(was_training)
        return self.encoder_class(config, base, peft_config)
