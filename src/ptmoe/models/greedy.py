"""Greedy decoding: what `generate` is told for it, and which bases can do without `generate`."""

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ptmoe.models.input_path import InputPath

# Greedy whatever the base's own generation config asks for: some ship a repetition penalty.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "renormalize_logits": False,
}
# Other fields of a base's generation config that change no greedy token; the caller decides where a row ends.
HARMLESS = {
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),  # of sampling
    *("max_length", "max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("use_cache", "cache_implementation", "transformers_version", "_from_model_config"),
}


def last_logits(base: PreTrainedModel, count: int = 1) -> dict[str, Any]:
    """Options of the base's `forward` that leave out the logits of all but the last positions, where it can."""
    takes = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    return {"return_dict": True, **({"logits_to_keep": count} if takes else {})}


def narrowest_window(base: PreTrainedModel) -> int | None:
    """Of its layers' sliding windows; None without any."""
    layers = DynamicCache(config=base.config).layers
    windows = [layer.sliding_window for layer in layers if layer.is_sliding]
    of_masks = getattr(base.config, "window_size", None)  # GPT-Neo's, of which its cache does not know
    return min([*windows, of_masks] if of_masks is not None else windows, default=None)


def stepping_obstacle(base: PreTrainedModel, path: InputPath | None = None) -> str | None:
    """Why greedy decoding of this base is left to `transformers`' `generate`; None where `Decoder` steps it itself."""
    path = path or InputPath()
    if path.per_layer is not None or path.first_position or not path.left_padding:
        return "it takes other inputs than embeddings, a mask and positions from 0, or does not mask padding"
    own = ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    replaced = [name for name in own if getattr(type(base), name) is not getattr(GenerationMixin, name)]
    if replaced or base.is_remote_code():
        return f"it has its own {', '.join(replaced) or 'code'}"
    other = {type(layer).__name__ for layer in DynamicCache(config=base.config).layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    if other or not base._supports_default_dynamic_cache():
        return f"its cache holds more than keys and values ({', '.join(sorted(other)) or 'a cache of its own'})"
    asked = base.generation_config.to_diff_dict().keys() - GREEDY.keys() - HARMLESS
    return f"its generation config sets {', '.join(sorted(asked))}" if asked else None
