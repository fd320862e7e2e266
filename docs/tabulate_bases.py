"""Every causal language model class of `transformers`, made tiny and tried: the table of `docs/bases.md`.

    python docs/tabulate_bases.py [--write]     prints the table, or writes it into docs/bases.md
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ptmoe.errors import PtmoeError
from ptmoe.models.causal import PromptedCausalLM

PAGE = Path(__file__).parent / "bases.md"
MARK = "<!-- table -->"
MOST_PARAMETERS = 30_000_000
# A config gets those of these fields that it has.
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 12, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
# What the fields above leave wrong.
OWN: dict[str, dict[str, object]] = {}


def tiny_config(model_type: str) -> transformers.PreTrainedConfig:
    """A small config of a model type, its fields set by name."""
    return _small(CONFIG_MAPPING[model_type], OWN.get(model_type, {}))


def _small(config_class: type, own: dict) -> transformers.PreTrainedConfig:
    default = config_class()
    fields = {name: value for name, value in SMALL.items() if getattr(default, name, None) is not None or name.endswith("token_id")}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        part_class = part if part is not transformers.AutoConfig else type(getattr(default, name))
        if isinstance(part_class, type) and getattr(default, name, None) is not None:
            fields[name] = _small(part_class, own.get(name, {})).to_dict()
    return config_class(**(fields | {name: value for name, value in own.items() if not isinstance(value, dict) or name not in fields}))


def tiny_model(model_type: str) -> transformers.PreTrainedModel:
    """A random model in evaluation mode, every parameter drawn.

    Raises:
        Exception: whatever the class raises; a ValueError where it is too large for a test.
    """
    config = tiny_config(model_type)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    module = importlib.import_module(CONFIG_MAPPING[model_type].__module__.rpartition(".")[0])
    model_class = getattr(module, name, None) or getattr(transformers, name)
    if model_class.config_class is not None and not isinstance(config, model_class.config_class):
        config = config.get_text_config()
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:,.0f} million parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def tried(model_type: str) -> tuple[str, str]:
    """`"works"`, `"works, row by row"`, `"refused"` or `"not built"`, and what there is to say."""
    try:
        base = tiny_model(model_type)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
    try:
        path = PromptedCausalLM(base).path
    except PtmoeError as error:
        return "refused", str(error)
    carried = [
        f"embeddings × {path.scale:.4g}" if path.scale != 1 else "",
        f"positions from {path.first_position}" if path.first_position else "",
        "inputs for each layer" if path.per_layer is not None else "",
    ]
    return "works" if path.left_padding else "works, row by row", "; ".join(filter(None, carried))


if __name__ == "__main__":
    import time
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    only = sys.argv[1:]
    for model_type in only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        t = time.time()
        print(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], *tried(model_type), f"{time.time()-t:.1f}s", sep=" | ", flush=True)
