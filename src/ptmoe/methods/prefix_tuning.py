"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190), with `peft`'s encoder: the attention of every layer finds
trainable keys and values before those of the input.

K = [K_P ; K_x],  V = [V_P ; V_x]              K_P, V_P: (layers, heads, T, d), after any rotation

The prefix has positions 0 to T - 1, each row's real tokens count on from T, and padding between them is masked, so it
changes nothing. A base whose layers attend to a window of positions, or cache something other than keys and values,
would lose the prefix, so it is refused; so is gradient checkpointing, which drops the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, InitialEmbeddings, MethodConfig, PreTrainedModel, Prompt, PromptEncoder, Size
from ptmoe.methods.injected import peft_errors


class PrefixTuningConfig(MethodConfig):
    """Prefix tuning: `2·layers·T·heads·d` trainable parameters, `heads` being those of keys and values.

    Attributes:
        num_virtual_tokens: `T`, the length of the prefix.
    """

    method = "prefix-tuning"
    order = 70
    free_sizes = ("num_virtual_tokens",)
    fills_cache = True
    default_learning_rate = 0.01
    num_virtual_tokens: Size = 20

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> PrefixTuning:
        return PrefixTuning(self, base)


class PrefixTuning(PromptEncoder):
    """Tensors: `prompt_embeddings (T, layers·2·heads·d)`."""

    config: PrefixTuningConfig

    def __init__(self, config: PrefixTuningConfig, base: PreTrainedModel) -> None:
        super().__init__(config)
        from peft.tuners.prefix_tuning import PrefixEncoder

        self.resolved_config = prefix_config(config, base)
        self.prefix = PrefixEncoder(self.resolved_config)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        layers, heads = self.resolved_config.num_layers, self.resolved_config.num_attention_heads
        flat = self.prefix(torch.arange(self.config.num_virtual_tokens, device=input_embeds.device))
        cache = flat.view(len(flat), layers, 2, heads, -1).permute(1, 2, 3, 0, 4)[:, :, None]  # one for all rows
        return Prompt(flat.new_zeros(len(input_embeds), 0, input_embeds.shape[2]), cache=cache)

    def initialise(self, source: InitialEmbeddings) -> None:
        """`peft` has initialised the prefix."""

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prefix.embedding.weight}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.prefix.embedding.weight.copy_(tensors["prompt_embeddings"])

    def peft_config(self) -> dict[str, Any]:
        fields: dict[str, Any] = self.resolved_config.to_dict() | {"inference_mode": True}
        return fields


def prefix_config(config: MethodConfig, base: PreTrainedModel) -> Any:
    """`peft`'s `PrefixTuningConfig` for a base: its `num_layers`, `num_attention_heads`, those of keys and values, and
    `token_dim`, their numbers together.

    Raises:
        PtmoeError: a base with layers that do not keep the keys and values of all positions, or that `peft` refuses.
    """
    from peft import PrefixTuningConfig as PeftPrefixConfig
    from peft.utils.other import _prepare_prompt_learning_config
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=base.config).layers
    other = [type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer]
    if other or not base._supports_default_dynamic_cache():
        raise PtmoeError(
            f"{config.method} does not fit {type(base).__name__}: its layers do not keep the keys and values of all "
            f"positions ({', '.join(dict.fromkeys(other)) or 'it has a cache of its own'}); use pt or pt-moe"
        )
    with peft_errors(f"{config.method} on {type(base).__name__}"):
        return _prepare_prompt_learning_config(
            PeftPrefixConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=config.num_virtual_tokens,
                num_transformer_submodules=1,
                base_model_name_or_path=base.name_or_path,
            ),
            base.config,
        )
