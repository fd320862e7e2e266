"""The architectures that tests run over and their sizes, for `conftest.py` without importing anything heavy."""

from typing import Any

HIDDEN, VOCABULARY, POSITIONS = 32, 100, 64
PAD = 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,  # tests of generation choose their own
}
ROTARY = {"num_key_value_heads": 2, "intermediate_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ROTARY),
    "qwen2": ("Qwen2", ROTARY),
    "mistral": ("Mistral", ROTARY | {"sliding_window": 12}),
    "gemma": ("Gemma", ROTARY | {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        ROTARY | {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 12},
    ),
    "gpt2": ("GPT2", {}),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 64}),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN}),
    "phi": ("Phi", {"intermediate_size": 64}),
}
