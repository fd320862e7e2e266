"""Every causal language model class of `transformers`, made tiny and tried: the table of `docs/bases.md`.

python docs/tabulate_bases.py [--write]     prints the table, or writes it into docs/bases.md
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

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
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": 12,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    "mamba_chunk_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 8,
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32, "layer_group_size": 2,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8, "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "head_dim": None}  # heads of latent attention
FOUR = {"num_hidden_layers": 4}  # so that there is a layer of each kind
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = ("phi3", "phi4_multimodal", "phimoe")
LONGROPE = ROPE | {"rope_type": "longrope", "original_max_position_embeddings": 12, "factor": 4.0}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0], "short_mscale": 1.0, "long_mscale": 1.2}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
HEADS = {"num_key_value_heads": 4}
BLOCKS = {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 8, "index_topk_blocks": 1}
SCALED = {"scale_embedding": True}
ROBERTA = {"pad_token_id": 1}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
IMAGES = {"image_token_id": 90, "video_token_id": 91, "audio_token_id": 92, "boi_token_id": 93, "eoi_token_id": 94}
# What the fields above leave wrong.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "kimi_linear"), MLA),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm3", "olmo_hybrid"), FOUR),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), FOUR),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), FOUR | INDEXER | {"indexer_compress_ratio": 4}),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"), ROBERTA),
    "bailing_hybrid": MLA | FOUR | {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1], "head_dim": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"embedding_multiplier": 5.656854249492381},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MLA | {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m3_vl_text": BLOCKS,
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp"], "n_groups": 1, "num_hidden_layers": None},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 12},
    "xmod": ROBERTA | {"default_language": "en_XX"},
    "xlm-roberta-xl": ROBERTA,
    # As those of Phi-3 for 128k positions, Phi-3.5-MoE and Phi-4-multimodal.
    **{key: {"original_max_position_embeddings": 12, "rope_parameters": {**LONGROPE}} for key in LONG},
    "xlstm": {"num_heads": 4},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16} | FOUR | HEADS,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "gemma3n_text": FOUR | {"num_kv_shared_layers": 2, "altup_num_inputs": 2, "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": SLIDING,
    "gemma4_unified_text": SLIDING,
    "gemma4": {"text_config": SLIDING} | IMAGES,
    "gemma4_unified": {"text_config": SLIDING} | IMAGES,
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), HEADS),
    "longcat_flash": MLA | {"qk_head_dim": 16, "head_dim": 8},
    **dict.fromkeys(("blenderbot-small", "marian", "mvp", "pegasus", "bart"), SCALED),
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8, "num_buckets": 2, "attn_layers": ["local", "lsh"],
        "num_hidden_layers": None, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "xlnet": {"d_head": 8, "d_inner": 64},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
}  # fmt: skip


def _small(config_class: Any, own: dict[str, Any]) -> transformers.PreTrainedConfig:
    default = config_class()
    has = default.to_dict().keys() | config_class.attribute_map.keys()
    fields = {name: value for name, value in SMALL.items() if name in has}
    for name, part_class in config_class.sub_configs.items():
        part = getattr(default, name, None)
        if part is not None:
            fields[name] = _small(part_class if isinstance(part, dict) else type(part), own.get(name, {})).to_dict()
    fields |= {name: value for name, value in own.items() if name not in config_class.sub_configs}
    return config_class(**{name: value for name, value in fields.items() if value is not None})


def tiny_model(model_type: str) -> transformers.PreTrainedModel:
    """A random model in evaluation mode, every parameter drawn.

    Raises:
        Exception: whatever the class raises; a ValueError where it is too large for a test.
    """
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = _small(model_class.config_class or CONFIG_MAPPING[model_type], OWN.get(model_type, {}))
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
        "padded batches no wider than its index_topk" if path.chosen is not None else "",
        "rows on either side of original_max_position_embeddings apart" if path.switches else "",
    ]
    return "works" if path.left_padding else "works, row by row", "; ".join(filter(None, carried))


def model_types() -> list[str]:
    """All that have a config of their own, in the order of `transformers`."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]


def row(model_type: str) -> str:
    with contextlib.redirect_stdout(sys.stderr):  # some classes print
        verdict, remark = tried(model_type)
    cells = (model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], verdict, remark.replace("|", ""))
    return f"| {' | '.join(cells)} |"


def table() -> str:
    return "\n".join(["| model type | class | | |", "|---|---|---|---|", *map(row, model_types())])


if __name__ == "__main__":
    from write_tables import command  # beside this file, which tests load by its path

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    command(__doc__, PAGE, lambda: [table()], MARK)
