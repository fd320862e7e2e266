"""Generation behind a prompt: what the base takes, `generate`, and whether greedy decoding can go without it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ptmoe.errors import PtmoeError
from ptmoe.models.adapter_set import Prompts
from ptmoe.models.splice import Spliced, align_right
from ptmoe.models.wrapper import ModelWrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_NEW_TOKENS = 20  # of transformers, where neither the caller nor the base sets a length
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


class GeneratingModel(ModelWrapper):
    """A wrapped decoder that takes `inputs_embeds` and generates."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    def compose(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[Spliced, Prompts]:
        """As `AdapterSet.compose`.

        Raises:
            PtmoeError: also, an input too long for the base's positions.
        """
        spliced, prompts = self.adapters.compose(input_ids, attention_mask, input_mask, adapter_names)
        self.check_length(spliced, prompts)
        return spliced, prompts

    def base_inputs(self, spliced: Spliced, prompts: Prompts, expand: int = 1) -> dict[str, Any]:
        """The arguments of the base's `forward`; a prompt in the key-value cache is repeated `expand` times per row."""
        inputs = {"inputs_embeds": spliced.embeds, "attention_mask": spliced.attention_mask}
        positions = spliced.position_ids
        if prompts.cache is not None:
            virtual = prompts.cached_length
            before = spliced.attention_mask.new_ones(len(positions), virtual)
            inputs["attention_mask"] = torch.cat([before, spliced.attention_mask], 1)
            positions = positions + virtual
            inputs["past_key_values"] = self._filled_cache(prompts.cache, len(positions) * expand)
        if self.takes_positions:
            inputs["position_ids"] = positions
        return inputs

    def _filled_cache(self, cache: Tensor, batch: int) -> DynamicCache:
        if self.training and getattr(self.base_model, "is_activation_checkpointing", False):
            raise PtmoeError("gradient checkpointing drops the cache that holds the prompt: leave it out")
        filled = DynamicCache(config=self.config)
        for index, (keys, values) in enumerate(cache.to(self.dtype).unbind()):
            filled.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return filled

    @property
    def max_positions(self) -> int | None:
        """How many positions the base has; None where it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def check_length(self, spliced: Spliced, prompts: Prompts, new: int = 0) -> None:
        """Learned positions would end in an index error deep in the base, rotary ones in silent nonsense.

        Raises:
            PtmoeError: the longest row, its virtual tokens and `new` ones need more positions than the base has.
        """
        limit, virtual, spliced_in = self.max_positions, prompts.length, prompts.embeds.shape[1]
        if limit is None or virtual + spliced.embeds.shape[1] - spliced_in + new <= limit:
            return
        longest = int(spliced.attention_mask.sum(1).max()) - spliced_in
        if longest + virtual + new > limit:
            raise PtmoeError(
                f"an input of {longest} tokens with {virtual} virtual tokens"
                + (f" and {new} new ones" if new else "")
                + f" exceeds the base's {limit} positions: shorten it to {max(limit - virtual - new, 0)} tokens"
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        input_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """`input_ids` followed by the new tokens; every option is that of `transformers`' `generate`.

        The prompt is composed once, from the whole input, and held. Padding may be on either side.

        Args:
            input_ids: `(B, L)`; `inputs` is another name for it.
            attention_mask: `(B, L)`; all ones by default.
            input_mask: `(B, L)`, the tokens that the router may read; all real ones by default.
            adapter_names: an adapter for each row; by default the active one.
            **options: `max_new_tokens`, `num_beams`, `do_sample`, `streamer`, `stopping_criteria`, … Lengths
                (`max_length`, `min_length`) count `input_ids` and new tokens, not virtual ones.
        """
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise PtmoeError("generate needs input_ids: the prompt is composed from the input")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
            if any(source.get(name) is not None for source in self._generation_settings(options)):
                raise PtmoeError(f"{name} re-reads the input without its prompt: leave it out")
        spliced, prompts = self.compose(input_ids, attention_mask, input_mask, adapter_names)
        order = align_right(spliced.attention_mask)
        spliced = Spliced(
            spliced.embeds.gather(1, order[..., None].expand_as(spliced.embeds)),
            spliced.attention_mask.gather(1, order),
            spliced.position_ids.gather(1, order),
        )
        limit = self.max_positions
        virtual = prompts.cached_length
        room = None if limit is None else limit - virtual - int(spliced.attention_mask.sum(1).max())
        options, new = self._with_new_tokens(options, input_ids.shape[1], room)
        self.check_length(spliced, prompts, new)
        base_inputs = self.base_inputs(spliced, prompts, self._copies(options) if virtual else 1)
        if virtual:  # transformers takes the cached positions off what it is given
            padding = spliced.embeds.new_zeros(len(spliced.embeds), virtual, spliced.embeds.shape[2])
            base_inputs["inputs_embeds"] = torch.cat([padding, spliced.embeds], 1)
            if self.takes_positions:
                first = torch.arange(virtual, device=padding.device).expand(len(padding), -1)
                base_inputs["position_ids"] = torch.cat([first, base_inputs["position_ids"]], 1)
        with self.lock:
            return self.base_model.generate(input_ids, **base_inputs, **options)

    def decoder_inputs(
        self, input_ids: Tensor, attention_mask: Tensor, new: int, input_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """What the base's `forward` takes first to decode `new` tokens greedily, behind the active adapter's prompt.

        Args:
            input_ids: `(B, L)`, padded on the left.
            attention_mask: `(B, L)`.
            new: how many tokens.
            input_mask: `(B, L)`, the tokens that the router may read; all real ones by default.

        Raises:
            PtmoeError: a row too long for the base's positions.
        """
        spliced, prompts = self.compose(input_ids, attention_mask, input_mask)
        self.check_length(spliced, prompts, new)
        return self.base_inputs(spliced, prompts)

    def fixed_prompts(self) -> Tensor | None:
        """`(N, T, H)`, prompts of which each input has exactly one before it, that of the highest gate; None where the
        active adapter composes a prompt for each input."""
        if not self.uses_adapter:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return self.encoder.fixed_prompts()

    def _generation_settings(self, options: dict[str, Any]) -> list[dict[str, Any]]:
        """Where `generate` reads a setting, in the order it looks: the options, a config given, the base's config."""
        given = options.get("generation_config")
        return [options, *([] if given is None else [vars(given)]), vars(self.base_model.generation_config)]

    def _copies(self, options: dict[str, Any]) -> int:
        """How many sequences `generate` makes of a row.

        Raises:
            PtmoeError: a setting that leaves out the cache that the prompt stands in.
        """
        settings = self._generation_settings(options)
        if next((one["use_cache"] for one in settings if one.get("use_cache") is not None), True) is False:
            raise PtmoeError("use_cache=False leaves out the cache that the prompt stands in: leave it out")
        if any(one.get("cache_implementation") is not None for one in settings):
            raise PtmoeError("cache_implementation makes another cache than the prompt stands in: leave it out")
        counts = ("num_beams", "num_return_sequences")
        return max(next((one[name] for one in settings if one.get(name) is not None), 1) for name in counts)

    def _with_new_tokens(self, options: dict[str, Any], length: int, room: int | None) -> tuple[dict[str, Any], int]:
        """The options with their lengths as numbers of new tokens, and the highest number of them.

        `transformers` would subtract the length of `inputs_embeds`, virtual tokens included, from a `max_length`; here
        it counts what the caller sees. `room` is the number of positions that the base has left, if it has a limit.
        """
        *asked, own = self._generation_settings(options)
        most = _new_tokens("max", asked, length)
        if most is None:  # the base's default, or that of transformers, as far as the base's positions go
            most = _new_tokens("max", [own], length)
            most = DEFAULT_NEW_TOKENS if most is None else most
            most = most if room is None else min(most, max(room, 1))
        if most < 1:
            raise PtmoeError(f"{most} new tokens after an input of {length}: raise max_length or max_new_tokens")
        least = _new_tokens("min", [*asked, own], length)
        lengths = {"max_length": None, "min_length": None, "max_new_tokens": most}
        lengths["min_new_tokens"] = None if least is None else max(least, 0)
        rest = {name: value for name, value in options.items() if name not in lengths}
        if options.get("generation_config") is None:
            return rest | {name: value for name, value in lengths.items() if value is not None}, most
        rest["generation_config"] = copy(options["generation_config"])
        for name, value in lengths.items():
            setattr(rest["generation_config"], name, value)
        return rest, most


def _new_tokens(bound: str, sources: list[dict[str, Any]], length: int) -> int | None:
    """The `"max"` or `"min"` of new tokens after an input of `length`, from the first source that has one."""
    for source in sources:
        if source.get(f"{bound}_new_tokens") is not None:
            return cast(int, source[f"{bound}_new_tokens"])
        if source.get(f"{bound}_length") is not None:
            return cast(int, source[f"{bound}_length"]) - length
    return None


def stepping_obstacle(base: PreTrainedModel) -> str | None:
    """Why greedy decoding of this base is left to `transformers`' `generate`; None where `Decoder` steps it itself."""
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
