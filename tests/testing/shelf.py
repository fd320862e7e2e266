"""Fields with which each type of `peft` fits a tiny base; those that are not here fit as they are."""

from typing import Any

from ptmoe.methods import shelf

OF_TYPE: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 4, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"progressbar": False},
    "GRALORA": {"r": 4, "alpha": 4},
    "HIRA": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "UNILORA": {"theta_d_length": 10},
    "VBLORA": {"r": 2, "num_vectors": 4, "vector_length": 4},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
OF_SHORT = {short: OF_TYPE.get(entry.type, {}) for short, entry in shelf.SHORT.items()}
