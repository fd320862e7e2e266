"""The variants of LoRA that `peft` has: other starts, another form of the product, another optimizer.

PiSSA, CorDA and KaSA take something out of the target modules' own weights before they train, so those cannot be
quantized. The rest of the base stays as it is, `disable_adapter` and `delete_adapter` bring the modules' weights back
to the bit (a copy of them is kept), and what PiSSA and CorDA save is LoRA of twice the rank on the untouched base, as
`peft` converts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import QUANTIZATIONS, Batches, Prompt, quantization_of
from ptmoe.methods.injected import ADAPTER, Injected, OwnOptimizer
from ptmoe.methods.lora import LoRAConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class DoRAConfig(LoRAConfig):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA of the weight's direction, and a trained magnitude of each output.

    y = m ⊙ (W + s B A) x / ‖W + s B A‖            m: (out,)
    """

    method: ClassVar[str] = "dora"
    unfit_on: ClassVar[tuple[str, ...]] = ("8bit",)  # on the CPU peft's loses the scales of 8-bit layers

    def peft_form(self, **common: Any) -> PeftConfig:
        return self.lora(use_dora=True, **common)


class KaSAConfig(LoRAConfig):
    """KaSA (Wang et al. 2024, arXiv:2412.06071): LoRA in the form of an SVD, `ΔW = s B diag(δ) A`, in place of the
    weight's `R` smallest singular components, with the paper's two regularisers added to the loss."""

    method: ClassVar[str] = "kasa"
    unfit_on: ClassVar[tuple[str, ...]] = QUANTIZATIONS

    @property
    def encoder(self) -> type[Injected]:
        return KaSA

    def peft_form(self, **common: Any) -> PeftConfig:
        from peft import KasaConfig

        return self.lora(kasa_config=KasaConfig(), **common)


class KaSA(Injected):
    changes_base: ClassVar[bool] = True

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        if self.training:
            prompt.auxiliary_loss = self.peft_model.base_model._get_kasa_loss()
        return prompt


class RiemannianConfig(LoRAConfig):
    """Riemannian preconditioned LoRA (Zhang and Pilanci 2024, arXiv:2402.02347): LoRA trained by AdamW on gradients
    that are multiplied by `(Bᵀ B + λ I)⁻¹` and `(A Aᵀ + λ I)⁻¹`. `PromptTrainer` takes the optimizer from here."""

    method: ClassVar[str] = "riemannian"

    @property
    def encoder(self) -> type[Injected]:
        return Riemannian


class Riemannian(OwnOptimizer):
    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_riemannian_optimizer

        self.made = True
        made: torch.optim.Optimizer = create_riemannian_optimizer(
            self.peft_model, torch.optim.AdamW, lr=learning_rate, weight_decay=weight_decay
        )
        return made


class LoRAFAConfig(LoRAConfig):
    """LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A keeps its random start and B alone trains, `R·out` numbers for
    each target module, on gradients projected by A. `PromptTrainer` takes the optimizer from here."""

    method: ClassVar[str] = "lora-fa"
    frozen: ClassVar[str | None] = "lora_A"

    @property
    def encoder(self) -> type[Injected]:
        return LoRAFA


class LoRAFA(OwnOptimizer):
    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_lorafa_optimizer

        self.made = True
        form = self.peft_model.peft_config[ADAPTER]
        made: torch.optim.Optimizer = create_lorafa_optimizer(
            self.peft_model, r=form.r, lora_alpha=form.lora_alpha, lr=learning_rate, weight_decay=weight_decay
        )
        return made


# -- starts that change the base ---------------------------------------------------------------------------------------


class PiSSAConfig(LoRAConfig):
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA that starts at the weight's `R` largest singular components,
    which are taken out of the weight. Saved as LoRA of rank `2·R`, the difference to the start: a loaded adapter that
    trains on is that LoRA."""

    method: ClassVar[str] = "pissa"
    unfit_on: ClassVar[tuple[str, ...]] = QUANTIZATIONS

    @property
    def encoder(self) -> type[Injected]:
        return Residual

    def peft_form(self, **common: Any) -> PeftConfig:
        return self.lora(init_lora_weights="pissa", **common)

    def saved_form(self, **common: Any) -> PeftConfig:
        form = self.lora(**common)
        form.r, form.lora_alpha = 2 * form.r, 2 * form.lora_alpha  # the same factor
        return form

    def on_saved(self, base: PreTrainedModel) -> Injected:
        config, common = self._fields(base)
        return Injected(config, base, self.saved_form(**common))


class Residual(Injected):
    """LoRA on what is left of the weights: `W = W' + s B₀ A₀` becomes `W' + s B A = W + s (B A - B₀ A₀)`."""

    changes_base: ClassVar[bool] = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.start = {key: value.clone() for key, value in super().tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """`[A; A₀]` and `[B, -B₀]` for each module."""
        return {
            key: torch.cat([value, self.start[key].to(value.device)])
            if "lora_A" in key
            else torch.cat([value, -self.start[key].to(value.device)], 1)
            for key, value in super().tensors().items()
        }

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for key, value in super().tensors().items():
            value.copy_(tensors[key][: len(value), : value.shape[1]])


# -- starts that need data ---------------------------------------------------------------------------------------------


class EVAConfig(LoRAConfig):
    """EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA whose A starts at the directions in which the modules' inputs
    vary most, over training batches. The rank is the same everywhere: the paper's redistribution would change the
    number of trained parameters."""

    method: ClassVar[str] = "eva"
    needs_batches: ClassVar[bool] = True

    def peft_form(self, **common: Any) -> PeftConfig:
        from peft import EvaConfig

        return self.lora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **common)

    def saved_form(self, **common: Any) -> PeftConfig:
        return self.lora(**common)

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        encoder = super().on(base)
        if batches is None:
            return encoder
        from peft import initialize_lora_eva_weights

        targets = encoder.peft_model.peft_config[ADAPTER].target_modules
        try:
            initialize_lora_eva_weights(
                encoder.peft_model,
                list(batches),
                forward_fn=lambda model, batch: base(**inputs_of(batch), use_cache=False),
                show_progress_bar=False,
            )
        except (ValueError, RuntimeError) as error:
            encoder.remove()
            raise PtmoeError(f"peft refuses eva: {' '.join(str(error).split())}") from None
        encoder.peft_model.peft_config[ADAPTER].target_modules = targets  # peft names each module by itself
        return encoder


class CorDAConfig(PiSSAConfig):
    """CorDA (Yang et al. 2024, arXiv:2406.05223): as PiSSA, but the components are those of the weight times the
    covariance of the module's inputs over training batches."""

    method: ClassVar[str] = "corda"
    needs_batches: ClassVar[bool] = True

    def peft_form(self, **common: Any) -> PeftConfig:
        from peft.tuners.lora.config import CordaConfig

        return self.lora(init_lora_weights="corda", corda_config=CordaConfig(), **common)

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self._fields(base)
        if batches is None:  # to be counted
            return self.encoder(config, base, self.lora(**common))
        from peft.tuners.lora.corda import preprocess_corda

        form = self.peft_form(**common)

        def run() -> None:
            for batch in batches:
                given = inputs_of(batch)
                for ids, mask in zip(*given.values(), strict=True):  # peft takes one row at a time, without padding
                    base(input_ids=ids[mask.bool()][None].to(base.device), use_cache=False)

        was_training = base.training
        try:
            preprocess_corda(base, form, run_model=run)
        except (ValueError, RuntimeError) as error:
            raise PtmoeError(f"peft refuses corda: {' '.join(str(error).split())}") from None
        finally:
            base.train(was_training)
        return self.encoder(config, base, form)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a training batch, without its labels."""
    ids = batch["input_ids"]
    return {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}
