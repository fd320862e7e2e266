"""Generation behind a prompt: what the base takes, and `generate`."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from ptmoe.errors import PtmoeError
from ptmoe.fast.attention import without_plans
from ptmoe.fast.linear import gapless_head
from ptmoe.fast.passes import CHANGES
from ptmoe.fast.trial import standing_in
from ptmoe.models.generation_settings import GenerationSettings, of_real_tokens
from ptmoe.models.input_path import PER_LAYER, checked_options, taking_embeddings
from ptmoe.models.prompts import Prompts
from ptmoe.models.rotation import reading_again
from ptmoe.models.splice import Spliced, align, splice
from ptmoe.models.wrapper import ModelWrapper

# Settings of `generate` that take the token ids again, and what they are where they are off: a draft's, one that reads
# them in pieces, one that changes them, and those that `transformers` leaves out where there are embeddings.
REREADING = {
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")),
    **dict.fromkeys(("use_mtp", "token_healing"), False),
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}


class FilledLayer(DynamicLayer):
    """One layer's cache with a prompt in it, which follows the layer to its device: a base may be on several."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            self.keys, self.values = (one.to(key_states.device) for one in (self.keys, self.values))
        held: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return held


class GeneratingModel(ModelWrapper):
    """A wrapped decoder that takes `inputs_embeds` and generates."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__(base)
        self.takes_positions = "position_ids" in inspect.signature(base.forward).parameters

    @property
    def generation_config(self) -> Any:
        """The base's, which may be set, as on a model of `transformers`."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.base_model.generation_config = config

    def compute_transition_scores(self, *arguments: Any, **options: Any) -> Tensor:
        """As that of `transformers`, from what `generate` returns."""
        return cast(Tensor, self.base_model.compute_transition_scores(*arguments, **options))

    def compose(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[Spliced, Prompts]:
        """As `AdapterSet.compose`; an input too long for the base's positions is a `PtmoeError` as well."""
        self.check_unchanged()
        spliced, prompts = self.adapters.compose(input_ids, attention_mask, input_mask, adapter_names)
        self.check_length(spliced, prompts)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._with_token_ids(spliced, prompts, input_ids, mask), prompts

    def _with_token_ids(self, spliced: Spliced, prompts: Prompts, input_ids: Tensor, mask: Tensor) -> Spliced:
        if self.path.per_layer is not None:
            virtual = input_ids.new_full((len(input_ids), prompts.embeds.shape[1], 1), self.path.placeholder)
            spliced.token_ids = splice(virtual, prompts.lengths, input_ids[..., None], mask).embeds[..., 0]
        return spliced

    def base_inputs(self, spliced: Spliced, prompts: Prompts, expand: int = 1) -> dict[str, Any]:
        """The arguments of the base's `forward`; what a row has in the key-value cache, and its changes of the layers,
        come `expand` times."""
        inputs: dict[str, Any] = {"inputs_embeds": spliced.embeds, "attention_mask": spliced.attention_mask}
        positions = spliced.position_ids + self.path.first_position
        if self.path.per_layer is not None and spliced.token_ids is not None:
            with torch.no_grad():
                inputs[PER_LAYER] = self.path.per_layer(spliced.token_ids)
        if prompts.cache is not None:
            virtual = prompts.cached_length
            before = spliced.attention_mask.new_ones(len(positions), virtual)
            inputs["attention_mask"] = torch.cat([before, spliced.attention_mask], 1)
            positions = positions + virtual
            inputs["past_key_values"] = self._filled_cache(prompts.cache, len(positions), expand)
        if self.takes_positions:
            inputs["position_ids"] = positions
        if prompts.changes is not None:
            inputs[CHANGES] = prompts.changes.repeated(expand)
        return inputs

    def _filled_cache(self, cache: Tensor, batch: int, copies: int) -> DynamicCache:
        self.check_cache()
        filled = DynamicCache(config=self.config)
        filled.layers = [FilledLayer() if type(one) is DynamicLayer else one for one in filled.layers]
        for index, layer in enumerate(cache.to(self.dtype).unbind()):
            keys, values = layer.expand(-1, batch, -1, -1, -1).repeat_interleave(copies, 1)
            filled.update(keys, values, index)
        return filled

    @property
    def max_positions(self) -> int | None:
        """How many positions the base has; None where it sets no limit."""
        limit: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit - self.path.first_position if limit and limit > 0 else None

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
            room = limit - virtual - new
            remedy = f"shorten it to {room} tokens" if room > 0 else "ask for fewer"
            raise PtmoeError(
                f"an input of {longest} tokens with {virtual} virtual tokens"
                + (f" and {new} new ones" if new else "")
                + f" exceeds the base's {limit} positions: {remedy}"
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
            attention_mask: `(B, L)`; by default, as in `transformers`, padding is where the padding token is, unless it
                ends texts as well.
            input_mask: `(B, L)`, the tokens that the router may read; all real ones by default.
            adapter_names: an adapter for each row; by default the active one.
            **options: `max_new_tokens`, `num_beams`, `do_sample`, `streamer`, `stopping_criteria`, … Lengths
                (`max_length`, `min_length`) count `input_ids` and new tokens, not virtual ones. What `guidance_scale`
                guides away from is read without a prompt, by layers that are changed as ever.

        Raises:
            PtmoeError: no input, one too long for the base's positions, or an option that cannot hold the prompt.
        """
        input_ids = inputs if input_ids is None else input_ids
        if not isinstance(input_ids, Tensor):
            raise PtmoeError("the prompt is composed from the input: generate(**tokenizer(text, return_tensors='pt'))")
        self.check_cache()
        if options.pop("labels", None) is not None:
            raise PtmoeError(
                "generate takes no labels: input_ids that hold their tokens would let the prompt read the answer, and "
                "it would be continued; give it the inputs alone (predict_with_generate: rows without labels)"
            )
        options = checked_options(self.base_model, input_ids, options, "generate")
        settings = self._settings(options)
        for name, off in REREADING.items():
            if settings.get(name, off) != off:
                raise PtmoeError(f"{name} re-reads the input without its prompt: leave it out")
        if settings.get("cache_implementation") == "paged":
            raise PtmoeError("cache_implementation='paged' reads the input without its prompt: leave it out")
        mask = settings.real_tokens(input_ids) if attention_mask is None else attention_mask
        spliced, prompts = self.compose(input_ids, mask, input_mask, adapter_names)
        spliced = spliced.reordered(align(spliced.attention_mask, "right"))
        limit, virtual = self.max_positions, prompts.cached_length
        room = None if limit is None else limit - virtual - int(spliced.attention_mask.sum(1).max())
        options, new = settings.with_new_tokens(input_ids.shape[1], room)
        self.check_length(spliced, prompts, new)
        again: list[int] = []  # lengths of token ids at which all is rotated anew
        if self.path.switches:
            lengths = spliced.attention_mask.sum(1) + virtual
            if self.path.straddled(int(lengths.min()), int(lengths.max()) + new - 1):
                again = [switch + 1 - prompts.length for switch in self.path.switches]
        aligned = input_ids
        if not bool(spliced.attention_mask.all()):
            if again or not self.path.left_padding:
                return self._row_by_row(input_ids, mask, input_mask, adapter_names, options)
            order = align(mask, "right")  # what reads the tokens (n-grams, criteria) finds the new ones after the last
            aligned = input_ids.gather(1, order)
            options = of_real_tokens(settings.get("repetition_penalty", 1.0), mask.gather(1, order), options)
        if virtual:
            settings.check_cache()
        base_inputs = self.base_inputs(spliced, prompts, settings.copies())
        if virtual:  # transformers takes the cached positions off what it is given
            padding = spliced.embeds.new_zeros(len(spliced.embeds), virtual, spliced.embeds.shape[2])
            base_inputs["inputs_embeds"] = torch.cat([padding, spliced.embeds], 1)
            if self.takes_positions:
                first = torch.arange(virtual, device=padding.device).expand(len(padding), -1) + self.path.first_position
                base_inputs["position_ids"] = torch.cat([first, base_inputs["position_ids"]], 1)
        if prompts.length and any(source.get("use_cache") is False for source in settings.asked):
            raise PtmoeError("use_cache=False reads the input again at each token, without its prompt: leave it out")
        if settings.own.get("use_cache") is False:
            options["use_cache"] = True
        per_layer = base_inputs.pop(PER_LAYER, None)
        anew = reading_again(self.base_model, again, partial(self._whole_inputs, prompts)) if again else nullcontext()
        base = self.base_model
        changed = standing_in(base, **{CHANGES: base_inputs.pop(CHANGES, None)})  # `generate` takes no such keyword
        with self.lock, without_plans(base), gapless_head(base), taking_embeddings(base, per_layer), anew, changed:
            made = base.generate(aligned, **base_inputs, **options)
        if aligned is not input_ids:
            sequences = made if isinstance(made, Tensor) else made.sequences
            sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(len(sequences) // len(input_ids), 0)
        return made

    def _settings(self, options: dict[str, Any]) -> GenerationSettings:
        return GenerationSettings(options, vars(self.base_model.generation_config))

    def _whole_inputs(self, prompts: Prompts, input_ids: Tensor) -> dict[str, Any]:
        """The arguments of the base's `forward` for `(B · copies, L)` token ids without padding, behind the prompts of
        `B` rows."""
        rows = torch.arange(len(prompts.embeds), device=input_ids.device)
        prompts = prompts.rows(rows.repeat_interleave(len(input_ids) // len(rows)))
        mask = torch.ones_like(input_ids)
        spliced = splice(prompts.embeds, prompts.lengths, self.adapters.embed(input_ids), mask)
        return self.base_inputs(self._with_token_ids(spliced, prompts, input_ids, mask), prompts)

    def _row_by_row(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_mask: Tensor | None,
        adapter_names: Sequence[str] | None,
        options: dict[str, Any],
    ) -> Tensor:
        """As `generate`, of each row without its padding."""
        settings = self._settings(options)
        if settings.get("return_dict_in_generate", False):
            raise PtmoeError(
                f"{type(self.base_model).__name__} does not mask padding, or rotates a row by its batch's longest, so "
                "rows of several lengths are generated one after another, as token ids alone: give it one row at a time"
            )
        made = []
        allowed = options.pop("prefix_allowed_tokens_fn", None)
        for row, real in enumerate(attention_mask.bool()):
            if allowed is not None:  # it is told which row it reads
                options["prefix_allowed_tokens_fn"] = lambda _, ids, row=row: allowed(row, ids)
            ids = input_ids[row, real][None]
            new = self.generate(
                ids,
                torch.ones_like(ids),
                input_mask=None if input_mask is None else input_mask[row, real][None],
                adapter_names=None if adapter_names is None else [adapter_names[row]],
                **options,
            )[:, int(real.sum()) :]
            made.append(torch.cat([input_ids[row].expand(len(new), -1), new], 1))
        end = torch.as_tensor(settings.get("eos_token_id", 0)).view(-1)  # pads in transformers where nothing else does
        pad, longest = settings.get("pad_token_id", int(end[0])), max(part.shape[1] for part in made)
        return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=pad) for part in made])

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
