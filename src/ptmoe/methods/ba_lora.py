"""BA-LoRA (Chang, Chang and Wu 2024, arXiv:2408.04556): PiSSA with three regularisers of what the model predicts.

loss = cross-entropy + λ₁ KL(p₀ ‖ p) - λ₂ H(p) - λ₃ Σ_{i ≤ k} σ_i / Σ_i σ_i         p = softmax(Z), Z: (B, V)

p₀ are the untouched base's predictions, H is the entropy and σ are the singular values of the logits Z: consistency
with the base, diversity, and outputs of low rank, in the paper's form for generation. The weights and k are those of
the authors' published script.

The paper has the predictions of every position. Here, where the loss keeps no logits, they are those of each row's last
token before the answer, from two more passes over the batch's inputs without their answers, one of them through the
untouched base: a step takes up to three times as long. The regularisers are means over the rows that are computed at
once, and the σ are of their matrix, so a batch in parts has other ones than the whole.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.fast.lock import base_lock
from ptmoe.fast.loss import projected_at
from ptmoe.methods.base import Batches, PreTrainedModel, Prompt
from ptmoe.methods.injected import Injected
from ptmoe.methods.pissa import PiSSAConfig, Residual

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BALoRA(Residual):
    config: "BALoRAConfig"

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        readable = input_mask.any(1)
        if self.training and torch.is_grad_enabled() and readable.any():
            embeds, mask = input_embeds[readable].detach(), input_mask[readable]
            with base_lock(self.base):
                with self.disabled(), torch.no_grad():
                    before = self.predict(embeds, mask)
                logits = self.predict(embeds, mask)
            prompt.auxiliary_loss = self.config.penalty(logits, before)
        return prompt

    def predict(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """`(B, V)`, float32: the logits behind each row's last token, of the tokens `(B, L)` that the mask marks."""
        order = mask.long().argsort(dim=1, descending=True, stable=True)  # they come first: any base masks that padding
        lengths = mask.sum(1)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))[:, : lengths.max()]
        mask = mask.gather(1, order)[:, : lengths.max()].long()
        rows = torch.arange(len(embeds), device=embeds.device)
        with projected_at(self.base.get_output_embeddings(), rows, lengths - 1):
            logits: Tensor = self.base(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[0]
        return logits.float()


class BALoRAConfig(PiSSAConfig):
    """BA-LoRA: `R·(in + out)` trainable parameters for each target module. Saved as PiSSA is.

    Attributes:
        consistency: `λ₁`, the weight of the divergence from the base's predictions.
        diversity: `λ₂`, the weight of the predictions' entropy.
        low_rank: `λ₃`, the weight of the largest singular values' share.
        num_singular_values: `k`, those that count as the largest.
    """

    method = "ba-lora"
    order = 520
    encoder_class = BALoRA
    adds_loss = True
    consistency: Weight = 1e-4
    diversity: Weight = 3e-4
    low_rank: Weight = 1e-4
    num_singular_values: Annotated[int, Field(gt=0)] = 3  # no `Size`: nothing grows with it

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        if getattr(base.config.get_text_config(), "hidden_size_per_layer_input", None):
            raise PtmoeError(
                f"{self.method} asks the base for predictions from embeddings, and the layers of "
                f"{type(base).__name__} take inputs beside them: take pissa"
            )
        return super().encoder_for(base, batches)

    def penalty(self, logits: Tensor, before: Tensor) -> Tensor:
        """The three regularisers of the logits `(B, V)`, `before` those of the base."""
        log, log_before = logits.log_softmax(1), before.log_softmax(1)
        divergence = (log_before.exp() * (log_before - log)).sum(1).mean()
        entropy = -(log.exp() * log).sum(1).mean()
        values = torch.linalg.svdvals(logits)
        share = values[: self.num_singular_values].sum() / values.sum()
        penalty: Tensor = self.consistency * divergence - self.diversity * entropy - self.low_rank * share
        return penalty
