"""Routing that does not collapse: what training, and only training, does for the router.

Two things, each an option of the method's config:

- `router_standardize`: before the first step the mean input embeddings of some training examples give the router's
  coordinates; when training ends they are folded into `W` and `b`.
- `routing_anneal`: the gate starts soft, so that every expert learns from every input, and hardens to the chosen one.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptmoe.methods.base import mean_input
from ptmoe.methods.pt_moe import PTMoE
from ptmoe.model import PromptedCausalLM, readable_tokens

STATISTICS_EXAMPLES = 512
SOFT_UNTIL, HARD_FROM = 0.6, 0.8  # of the training steps


class RoutingCallback(TrainerCallback):
    """Add it to any `transformers.Trainer` that trains a PT-MoE adapter; `ptmoe train` does."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PromptedCausalLM,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        encoder = model.encoder
        if isinstance(encoder, PTMoE):
            encoder.guided = True
            if encoder.config.router_standardize and state.global_step == 0:
                encoder.router.standardize(sample_means(model, train_dataloader))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PromptedCausalLM, **_: Any
    ) -> None:
        encoder = model.encoder
        if isinstance(encoder, PTMoE) and encoder.config.routing_anneal:
            progress = state.global_step / max(state.max_steps, 1)
            encoder.hardness = min(1.0, max(0.0, (progress - SOFT_UNTIL) / (HARD_FROM - SOFT_UNTIL)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PromptedCausalLM, **_: Any
    ) -> None:
        if isinstance(model.encoder, PTMoE):
            model.encoder.finish_training()


@torch.no_grad()
def sample_means(model: PromptedCausalLM, loader: Any) -> torch.Tensor:
    """Mean input embeddings `(examples, H)` of training examples spread over the data set; draws no random number."""
    data = loader.dataset
    count = min(STATISTICS_EXAMPLES, len(data))
    rows = [data[i * len(data) // count] for i in range(count)]
    means = []
    for start in range(0, count, 64):
        batch = {k: v.to(model.device) for k, v in loader.collate_fn(rows[start : start + 64]).items()}
        mask = batch.get("input_mask")
        if mask is None:
            mask = readable_tokens(batch["attention_mask"], batch["labels"])
        means.append(mean_input(model.get_input_embeddings()(batch["input_ids"]), mask.bool()))
    return torch.cat(means)
