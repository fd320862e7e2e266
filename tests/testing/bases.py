"""Tiny random base models of every supported architecture, adapters on them, and padded batches to give them.

They are on `PTMOE_TEST_DEVICE`, by default the CPU; their numbers are the same on every device.
"""

import os
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ptmoe.methods import METHODS, DPTConfig, MethodConfig, PTConfig, PTMoEConfig
from ptmoe.models.attach import attach
from ptmoe.models.causal import PromptedCausalLM
from testing.architectures import ARCHITECTURES, COMMON, PAD, VOCABULARY

DEVICE = torch.device(os.environ.get("PTMOE_TEST_DEVICE", "cpu"))
LLAMA_1B = transformers.LlamaConfig(  # Llama-3.2-1B's sizes, of which the paper's counts are
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)

PT_MOE: dict[str, Any] = {"num_virtual_tokens": 6, "num_experts": 3, "rank": 4, "recipe": "paper"}
SELECTIVE_PROBATIONARY = {
    "PT-MoE selective probationary": PTMoEConfig(**PT_MOE),
    "PT-MoE selective": PTMoEConfig(**PT_MOE, probationary=False),
    "PT-MoE probationary": PTMoEConfig(**PT_MOE, selective=False),
    "PT-MoE neither": PTMoEConfig(**PT_MOE, selective=False, probationary=False),
}
CONFIGS: dict[str, MethodConfig] = {
    "PT": PTConfig(num_virtual_tokens=5),
    "DPT": DPTConfig(num_virtual_tokens=5, rank=3),
    **SELECTIVE_PROBATIONARY,
    "SMoP": METHODS["smop"](num_virtual_tokens=4, num_experts=3),
    "ATTEMPT": METHODS["attempt"](num_virtual_tokens=4),
    "PT-MoE frozen projection": PTMoEConfig(**PT_MOE | {"rank": 7}, frozen_projection=True, projection_seed=3),
    "ULPT": METHODS["ulpt"](num_virtual_tokens=5, rank=7, projection_seed=3),
    "ID-SPAM": METHODS["id-spam"](num_virtual_tokens=4, bottleneck=3),
    "EPT": METHODS["ept"](num_virtual_tokens=4, num_decomposed_tokens=6, rank=3, num_spaces=3, space_rank=2),
}
BY_ROW: dict[str, MethodConfig] = {  # which change the base's layers for each row
    "PT-MoE with RoAd": METHODS["pt-moe-road"](num_virtual_tokens=5, num_experts=3, rank=4),
}


def tiny(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode; its config's dropout is the architecture's default.

    Every parameter is drawn, those that usually start as zeros or ones (biases, norms, the padding token's embedding)
    included, so that none is invisible in the logits.
    """
    name, sizes = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(**(COMMON | sizes | changes))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes many times as long, for CUDA's
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(DEVICE).eval()


def tiny_llama(*, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return tiny("llama", seed=seed, **changes)


def prompted(base: PreTrainedModel, config: MethodConfig, seed: int = 1, name: str = "default") -> PromptedCausalLM:
    """An adapter with every number drawn, and a router sharp enough to send different inputs to different experts."""
    model = attach(base, config, seed=seed, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.encoder.named_parameters():
            scale = 8.0 if key == "router.weight" else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(length: int, seed: int = 0) -> Tensor:
    """`(length,)` token ids, none of them special."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).to(DEVICE)


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a collator has made, where the bases are."""
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def array(tensor: Tensor) -> np.ndarray:
    """In float64."""
    return tensor.detach().double().cpu().numpy()


def own_projection(rank: int, hidden: int, seed: int) -> np.ndarray:
    """A frozen random projection `(R, H)` in float64 from numpy's Mersenne twister and the formula of Box and Muller,
    in blocks of 16 numbers: what the seed decides, on any machine. R·H is a multiple of 16."""
    words = np.random.RandomState(seed).randint(0, 2**32, 2 * rank * hidden, np.uint32).astype(np.uint64)
    uniform = ((words[0::2] << np.uint64(32) | words[1::2]) % np.uint64(2**53)).astype(float).reshape(-1, 2, 8) / 2**53
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 0])), 2 * np.pi * uniform[:, 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return np.asarray(normal.reshape(rank, hidden) / np.sqrt(rank))


def pad(row: Tensor, left: int, right: int, value: int = PAD) -> Tensor:
    return torch.nn.functional.pad(row, (left, right), value=value)


def batch(rows: list[Tensor], lefts: list[int], width: int | None = None) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask (B, L)`: each row after its own number of padding tokens, more to its right."""
    width = width or max(len(row) + left for row, left in zip(rows, lefts, strict=True))
    ids = [pad(row, left, width - left - len(row)) for row, left in zip(rows, lefts, strict=True)]
    mask = [pad(torch.ones_like(row), left, width - left - len(row)) for row, left in zip(rows, lefts, strict=True)]
    return torch.stack(ids), torch.stack(mask)
