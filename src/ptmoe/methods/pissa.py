"""PiSSA (Meng et al. 2024, arXiv:2404.02948), from `peft`: LoRA that starts at the weight's principal components.

W = U Σ Vᵀ,  s B₀ A₀ = U_R Σ_R V_Rᵀ,  W' = W - s B₀ A₀          s = α / R
y = (W' + s B A) x = (W + s (B A - B₀ A₀)) x                     A: (R, in), B: (out, R)

The target modules' own weights are replaced by `W'` before training, so they cannot be quantized. `disable_adapter` and
`delete_adapter` restore `W` to the bit from a copy, and the saved adapter is the second form: LoRA of rank `2·R` on the
untouched base, as `peft` converts it. A loaded adapter that trains on is that LoRA, and says so.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ptmoe.methods.base import QUANTIZATIONS, PreTrainedModel, Prompt
from ptmoe.methods.injected import ADAPTER, Injected, PeftConfig
from ptmoe.methods.lora import LoRAFamilyConfig
from ptmoe.methods.parts import check_rank
from ptmoe.methods.weights import features_of, modules_named


class Residual(Injected):
    """LoRA on what remains of the weights without the initial product."""

    rewrites_weights = True

    config: Any  # with a rank

    def __init__(self, config: Any, base: PreTrainedModel, peft_config: PeftConfig) -> None:
        for module in modules_named(base, config.target_modules or []).values():
            check_rank(config.rank, *features_of(module))  # peft would make smaller factors than the folder says
        super().__init__(config, base, peft_config)
        self.start = {key: value.clone() for key, value in super().tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """`[A; A₀] (2·R, in)` and `[B, -B₀] (out, 2·R)` for each module."""
        return {
            key: torch.cat([value, self.start[key].to(value.device)])
            if "lora_A" in key
            else torch.cat([value, -self.start[key].to(value.device)], 1)
            for key, value in super().tensors().items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """A checkpoint's, with the start that it was trained from: corda's is another on other training data."""
        another = False
        for key, value in super().tensors().items():
            dim = 0 if "lora_A" in key else 1
            trained, start = tensors[key].chunk(2, dim)
            value.copy_(trained)
            start = (-start if dim else start).to(self.start[key])
            another |= not torch.equal(start, self.start[key])
            self.start[key] = start
        if another:
            self._take_off_start()

    def _take_off_start(self) -> None:
        """Let the target modules' weights be `W'` of this start."""
        originals = {id(one): weight for one, weight in zip(self.modules_before, self.weights_before, strict=True)}
        for name, one in self.base.named_modules():
            if not hasattr(one, "lora_A"):
                continue
            layer: Any = one
            module = layer.get_base_layer()
            a, b = (self.start[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
            product = layer.scaling[ADAPTER] * b @ a
            weight, original = module.weight, originals[id(module)].to(a)
            weight.data = (original - (product.T if layer.fan_in_fan_out else product)).to(weight)


class Converted(Injected):
    """A saved adapter of the family, on the untouched base."""

    config: Any  # with a rank
    warned = False

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        if self.training and torch.is_grad_enabled() and not self.warned:
            self.warned = True
            warnings.warn(
                f"a loaded {self.config.method} adapter is LoRA of rank {2 * self.config.rank} on the untouched base, "
                f"and trains on as that, not as {self.config.method}",
                stacklevel=2,
            )
        return super().forward(input_embeds, input_mask)


class PiSSAConfig(LoRAFamilyConfig):
    """PiSSA: `R·(in + out)` trainable parameters for each target module."""

    method = "pissa"
    order = 130
    unsupported_quantizations = QUANTIZATIONS
    encoder_class = Residual

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(init_lora_weights="pissa", **common)

    def saved_peft_config(self, **common: Any) -> PeftConfig:
        saved = self.lora_config(**common)
        saved.r, saved.lora_alpha = 2 * saved.r, 2 * saved.lora_alpha  # the same factor
        return saved

    def saved_encoder_for(self, base: PreTrainedModel) -> Injected:  # of LoRA, so the base may be quantized
        config, common = self.resolved(base)
        return Converted(config, base, self.saved_peft_config(**common))
