"""The bases that are measured: the shapes of Llama models with seeded random weights. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; heads are `hidden / heads` wide, the output embedding is tied to the input's.

    Attributes:
        dtypes: that it is measured in.
        resident: whether a process for each system of a comparison fits into a computer's memory at once.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    dtypes: tuple[str, ...]
    resident: bool = True

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden:,}, {self.layers} layers, {self.heads} heads, {self.kv_heads} key-value heads, "
            f"intermediate {self.intermediate:,}, vocabulary {self.vocabulary:,}, tied embeddings"
        )

    def build(self, dtype: str, device: str) -> PreTrainedModel:
        """The same weights for every system on a device."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


SHAPES = {
    "sketch": Shape(512, 8, 8, 8, 1_408, 128_256, ("float32", "bfloat16")),
    "llama-1b": Shape(2_048, 16, 32, 8, 8_192, 128_256, ("bfloat16",), resident=False),  # Llama-3.2-1B's own
    "tiny": Shape(64, 2, 4, 2, 64, 512, ("float32",)),  # for --quick: shows that the command works, and no more
}
