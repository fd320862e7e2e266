"""PromptedCausalLM: a base model and its adapters as one model."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ptmoe.adapters.folder import fingerprint
from ptmoe.errors import PtmoeError, near
from ptmoe.fast.last_layer import last_layer, narrowed
from ptmoe.fast.linear import by_onednn
from ptmoe.fast.loss import (
    IGNORED,
    LOGITS_AT_ONCE,
    Hidden,
    TokenStatistics,
    cross_entropy,
    cross_entropy_in_parts,
    projected_at,
    supervised_positions,
)
from ptmoe.fast.packing import pack, packed_attention, why_not
from ptmoe.methods.base import (
    MethodConfig,
    PromptEncoder,
    Routing,
)
from ptmoe.models.splice import Spliced, align_right, splice

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

DEFAULT_NEW_TOKENS = 20  # of transformers, where neither the caller nor the base sets a length
CHANGED_BY = "ptmoe_method"  # an attribute of a base whose layers a method has changed
BASE = "__base__"  # in `adapter_names`, as in peft: this row gets no prompt


@dataclass
class PromptedOutput(ModelOutput):
    """What `PromptedCausalLM` returns.

    Attributes:
        loss: mean cross-entropy over the supervised tokens.
        logits: `(B, L, V)`, aligned with `input_ids`: `logits[b, j]` scores what follows token `j`. None where they
            were skipped.
        hidden_states: of the base, virtual positions included, if asked for.
        attentions: likewise.
        routing: the gate and probabilities `(B, N)`, for methods that route and rows of one adapter.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    # Attributes but not items: `Trainer` pads and joins every item over the batches of an evaluation.
    routing = cast("Routing | None", None)


@dataclass
class _Prompts:
    """The prompts of a batch: `embeds (B, T, H)` aligned to the right, `lengths (B,)` or None where all are `T`; the
    rest as in `ptmoe.methods.Prompt`, where all rows have one adapter."""

    embeds: Tensor
    lengths: Tensor | None = None
    routing: Routing | None = None
    cache: Tensor | None = None
    auxiliary_loss: Tensor | None = None

    @property
    def length(self) -> int:
        """How many positions they take at most."""
        return self.embeds.shape[1] + (0 if self.cache is None else self.cache.shape[3])


def readable_tokens(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """`(B, L)`, true at the real tokens before each row's first supervised one: what the router may read."""
    supervised = (labels != IGNORED) & attention_mask.bool()
    return attention_mask.bool() & (supervised.long().cumsum(1) == 0)


def _check_shapes(input_ids: Tensor, **others: Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise PtmoeError(f"input_ids has shape {tuple(input_ids.shape)}: needs (batch, length)")
    for name, other in others.items():
        if other is not None and other.shape != input_ids.shape:
            raise PtmoeError(
                f"{name} has shape {tuple(other.shape)}, input_ids {tuple(input_ids.shape)}: make them equal"
            )


class PromptedCausalLM(nn.Module):
    """A frozen causal language model whose input is preceded by a soft prompt composed for it, or whose layers a
    weight-side method (LoRA, …) has changed.

    Made by `attach` or `load_adapter`. It takes what a `transformers` model takes. The base is not part of
    `state_dict()`: checkpoints hold adapters only.

    A model may hold any number of prompts, and a batch may mix them. A weight-side method changes the layers that all
    rows go through, so a model holds one such adapter and no other.

    Attributes:
        base_model: the frozen model; with a weight-side adapter, its parts are in it.
        packing: whether the loss is computed on the rows of a batch end to end, without their padding: None where the
            base allows it, True to insist, False for the padded batch. The loss is the same.
        encoders: the encoder of each adapter, by name.
        active_adapter: the name of the one in use.
    """

    accepts_loss_kwargs = True  # `transformers.Trainer` then passes num_items_in_batch
    loss_type = None  # no shifting: the first real token has a predictor too, the last virtual one
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        parameters = inspect.signature(base.forward).parameters
        if "inputs_embeds" not in parameters or base.config.is_encoder_decoder:
            raise PtmoeError(
                f"{type(base).__name__} is not a decoder that takes inputs_embeds: give a causal language model"
            )
        held = vars(base).get(CHANGED_BY)
        if held is not None:
            raise PtmoeError(f"this base holds a {held} adapter, which changes its layers: load the base again")
        base.requires_grad_(False)
        self.base_model = base
        self.embedding_fingerprint = fingerprint(base.get_input_embeddings().weight)  # as it is before any training
        self.encoders = nn.ModuleDict()
        self.active_adapter = ""
        self._configs: dict[str, MethodConfig] = {}
        self._takes_positions = "position_ids" in parameters
        self._enabled = True
        self.packing: bool | None = None
        self._packable: bool | None = None  # not yet tried
        self._narrowable: tuple[nn.Module | None] | None = None  # likewise; in a tuple, for it is the base's
        self.train(base.training)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(
        self, name: str, config: MethodConfig, make: Callable[[PreTrainedModel], PromptEncoder]
    ) -> PromptEncoder:
        """Add the encoder that `make` gives for the base under a name, and make it the active one.

        Raises:
            PtmoeError: a name that cannot be used, or adapters that one model cannot hold together.
        """
        # An nn.ModuleDict holds no key that is one of its own attributes, "train" or "keys".
        if not name or "." in name or name == BASE or hasattr(nn.ModuleDict, name):
            raise PtmoeError(f"adapter name {name!r} cannot be used: choose another word, without dots")
        if name in self.encoders:
            raise PtmoeError(f"adapter {name!r} is there already: choose another name or delete_adapter({name!r})")
        if self.encoders and (config.changes_layers or self._changes_base):
            changes = config.method if config.changes_layers else self.method_config.method
            raise PtmoeError(
                f"{changes} changes the base's layers, so a model holds one such adapter and no other; this one holds "
                f"{', '.join(self.encoders)}: use a base of its own, or delete_adapter"
            )
        encoder = make(self.base_model)
        # Thousands of adapters have a few configs.
        encoder.config = self._configs.setdefault(
            encoder.config.model_dump_json() + encoder.config.method, encoder.config
        )
        self.encoders[name] = encoder.to(self.device).train(self.training)
        if config.changes_layers:
            vars(self.base_model)[CHANGED_BY] = config.method
        self.set_adapter(name)
        return encoder

    def set_adapter(self, name: str) -> None:
        """Make one adapter the active one: used where no `adapter_names` are given, and the one that trains."""
        encoder = self._encoder(name)
        if self.active_adapter in self.encoders:  # the others do not train already
            self._encoder(self.active_adapter).requires_grad_(False)
        encoder.requires_grad_(True)
        self.active_adapter = name

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not the active one, or a weight-side one, whose parts are taken out of the base.

        Raises:
            PtmoeError: no such adapter, the active one, or one that cannot be taken out (`ft`).
        """
        encoder = self._encoder(name)
        if name == self.active_adapter:
            if not self._changes_base:
                raise PtmoeError(f"adapter {name!r} is active: set_adapter to another first")
            encoder.remove()
            vars(self.base_model).pop(CHANGED_BY)
            self.active_adapter = ""
        del self.encoders[name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is its untouched base.

        Raises:
            PtmoeError: `ft`, which has changed the base for good.
        """
        before, self._enabled = self._enabled, False
        try:
            with self.encoder.disabled() if before and self.active_adapter else nullcontext():
                yield
        finally:
            self._enabled = before

    @property
    def uses_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self._enabled and bool(self.active_adapter)

    @property
    def _changes_base(self) -> bool:
        return bool(self.active_adapter) and self.method_config.changes_layers

    @property
    def encoder(self) -> PromptEncoder:
        """The active adapter's encoder."""
        return self._encoder(self.active_adapter)

    @property
    def method_config(self) -> MethodConfig:
        """The active adapter's config."""
        return self.encoder.config

    @property
    def num_virtual_tokens(self) -> int:
        """How many positions the active adapter's prompt takes; 0 without one."""
        return self.method_config.num_virtual_tokens if self.uses_adapter else 0

    def _encoder(self, name: str) -> PromptEncoder:
        if name not in self.encoders:
            raise PtmoeError(f"no adapter {name!r}{near(name, self.encoders)}")
        return cast(PromptEncoder, self.encoders[name])

    # -- what a transformers model has -------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def generation_config(self) -> Any:
        return self.base_model.generation_config

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.base_model.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.base_model.dtype)

    @property
    def name_or_path(self) -> str:
        return cast(str, self.base_model.name_or_path)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base_model.get_output_embeddings())

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """`trl`'s trainers call it at the end of their construction: all but the bridge, which adds `"ptmoe"`, are
        refused here, before anything is trained.

        Raises:
            PtmoeError: `trl` without the bridge.
        """
        if "trl" in tags and "ptmoe" not in tags:
            raise PtmoeError(
                "trl cannot train a prompted model by itself: its fused head replaces forward, runs the base model "
                "without the prompt and keeps the labels to itself, so a router would average the answers too. For "
                "supervised fine-tuning use SFTTrainer from ptmoe.train.trl"
            )

    def can_generate(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        """`lm_eval`'s `hf` ties the weights of the model it is given, and scores context and continuation as one text
        later: that is where it is stopped."""
        if name == "tie_weights":
            raise AttributeError(
                "the harness's hf model would let the router read the continuation: give it "
                "ptmoe.evaluate.harness.PromptedLM(pretrained=model, tokenizer=tokenizer)"
            )
        return super().__getattr__(name)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.base_model.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        self.base_model.activation_checkpointing_disable()

    # Their names before transformers 5.
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        left_out = {id(p) for p in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        return sum(
            _numbers(p) for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in left_out
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapters' tensors as they are in training; the base has a folder of its own."""
        prefix = options.pop("prefix", "")
        return cast(dict[str, Any], self.encoders.state_dict(*arguments, prefix=f"{prefix}encoders.", **options))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        prefix = "encoders."
        return self.encoders.load_state_dict(
            {key.removeprefix(prefix): value for key, value in state_dict.items()}, strict=strict, assign=assign
        )

    def save_pretrained(self, save_directory: str | Path, adapter_name: str | None = None, **options: Any) -> None:
        """Write the adapter folder of the active adapter, or of a named one.

        `push_to_hub=True` and its options are those of `transformers`.
        """
        from ptmoe.adapters.folder import save_adapter

        push_to_hub, repo_id = options.pop("push_to_hub", False), options.pop("repo_id", None)
        for ignored in ("state_dict", "is_main_process", "safe_serialization"):  # `Trainer` passes them
            options.pop(ignored, None)
        save_adapter(self, save_directory, adapter_name)
        if push_to_hub:
            self._upload(save_directory, repo_id or Path(save_directory).name, **options)

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **options: Any) -> None:
        """Upload the adapter folder to the Hugging Face Hub; `options` go to `huggingface_hub.upload_folder`."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_name)
            self._upload(folder, repo_id, **options)

    def _upload(self, folder: str | Path, repo_id: str, **options: Any) -> None:
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        made = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, **options)

    # -- the way through ---------------------------------------------------------------------------------------------

    def encode(self, embeds: Tensor, input_mask: Tensor, adapter_names: Sequence[str] | None = None) -> _Prompts:
        """The prompts of a batch, each row's from its own adapter.

        Args:
            embeds: `(B, L, H)`.
            input_mask: `(B, L)`, true at the tokens that decide the prompt.
            adapter_names: one name for each row; None is the active adapter for all, or no prompt where there is none.
        """
        if adapter_names is None:
            adapter_names = [self.active_adapter if self.uses_adapter else BASE] * len(embeds)
        elif self._changes_base and set(adapter_names) != {self.active_adapter}:
            raise PtmoeError(
                f"adapter_names={list(adapter_names)!r:.80}: {self.method_config.method} changes the layers that all "
                "rows go through, so a batch has one adapter; mixed batches are for prompts, and disable_adapter() is "
                "for the base"
            )
        if len(adapter_names) != len(embeds):
            raise PtmoeError(f"adapter_names has {len(adapter_names)} names for {len(embeds)} rows: give one each")
        # The soft prompt is composed in float32 whatever the mixed precision around it.
        with torch.autocast(embeds.device.type, enabled=False):
            names = list(dict.fromkeys(adapter_names))
            if len(names) == 1 and names[0] != BASE:
                prompt = self._encoder(names[0])(embeds, input_mask)
                return _Prompts(prompt.embeds, None, prompt.routing, prompt.cache, prompt.auxiliary_loss)
            parts = []
            for name in names:
                rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=embeds.device)
                one = None if name == BASE else self._encoder(name)(embeds[rows], input_mask[rows])
                if one is not None and one.cache is not None:
                    raise PtmoeError(
                        f"adapter {name!r} stands in the cache of all rows, {self._encoder(name).config.method} cannot "
                        "be mixed in a batch: give it a batch of its own"
                    )
                parts.append((rows, None if one is None else one.embeds))
            longest = max(0 if made is None else made.shape[1] for _, made in parts)
            prompts = embeds.new_zeros(len(embeds), longest, embeds.shape[2], dtype=torch.float32)
            lengths = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
            for rows, made in parts:
                if made is not None:
                    padded = nn.functional.pad(made, (0, 0, longest - made.shape[1], 0))
                    prompts = prompts.index_copy(0, rows, padded)
                    lengths[rows] = made.shape[1]
            return _Prompts(prompts, lengths)

    def _splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        input_mask: Tensor | None,
        adapter_names: Sequence[str] | None,
    ) -> tuple[Spliced, _Prompts, Tensor]:
        _check_shapes(input_ids, attention_mask=attention_mask, input_mask=input_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds = self.get_input_embeddings()(input_ids)
        readable = attention_mask.bool() if input_mask is None else input_mask.bool() & attention_mask.bool()
        prompts = self.encode(embeds, readable, adapter_names)
        spliced = splice(prompts.embeds, prompts.lengths, embeds, attention_mask)
        self._check_length(spliced, prompts)
        return spliced, prompts, attention_mask

    def _inputs(self, spliced: Spliced, prompts: _Prompts, expand: int = 1) -> dict[str, Any]:
        """What the base's `forward` takes; a prompt that stands in the cache `expand` times for each row."""
        inputs = {"inputs_embeds": spliced.embeds, "attention_mask": spliced.attention_mask}
        positions = spliced.position_ids
        if prompts.cache is not None:
            virtual = prompts.cache.shape[3]
            before = spliced.attention_mask.new_ones(len(positions), virtual)
            inputs["attention_mask"] = torch.cat([before, spliced.attention_mask], 1)
            positions = positions + virtual
            inputs["past_key_values"] = self._filled_cache(prompts.cache, len(positions) * expand)
        if self._takes_positions:
            inputs["position_ids"] = positions
        return inputs

    def _filled_cache(self, cache: Tensor, batch: int) -> DynamicCache:
        from transformers.cache_utils import DynamicCache

        if self.training and getattr(self.base_model, "is_activation_checkpointing", False):
            raise PtmoeError("gradient checkpointing drops the cache that the prompt stands in: leave it out")
        filled = DynamicCache(config=self.config)
        for index, (keys, values) in enumerate(cache.to(self.dtype).unbind()):
            filled.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), index)
        return filled

    @property
    def max_positions(self) -> int | None:
        """How many positions the base has; None where it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def _check_length(self, spliced: Spliced, prompts: _Prompts, new: int = 0) -> None:
        """Learned positions end in an index error deep in the base, rotary ones in silent nonsense: say it here."""
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        input_mask: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        token_statistics: TokenStatistics | None = None,
        **options: Any,
    ) -> PromptedOutput:
        """Logits aligned with `input_ids`, and the loss over supervised tokens.

        Args:
            input_ids: `(B, L)`.
            attention_mask: `(B, L)`, 1 at real tokens, padding on either side; all ones by default.
            labels: `(B, L)`, the completion's token ids, -100 elsewhere; not shifted.
            input_mask: `(B, L)`, the tokens that the router may read. By default those before the first supervised
                one, or all real tokens without labels: pass it when scoring text that holds an answer.
            adapter_names: an adapter for each row, or `"__base__"`; by default the active one for all.
            num_items_in_batch: supervised tokens of the global batch, from `Trainer`.
            skip_logits: compute no logits but those the loss needs, and return none; by default in training with
                labels. Then nothing is computed for padding either (`packing`).
            token_statistics: told of the supervised tokens' predictions.
            **options: go to the base model (`output_hidden_states`, …).

        Raises:
            PtmoeError: shapes that do not agree, an unknown adapter, an input too long for the base's positions, or
                training a routed adapter with neither labels nor input_mask.
            ValueError: a routed row without an input token.
        """
        for name in ("inputs_embeds", "past_key_values", "position_ids"):
            if options.pop(name, None) is not None:
                raise PtmoeError(f"forward takes no {name}: it splices the prompt itself; use generate() to decode")
        options.setdefault("use_cache", False)
        options["return_dict"] = True
        kept = options.pop("logits_to_keep", 0)  # counts tokens of the input, as in transformers
        _check_shapes(input_ids, attention_mask=attention_mask, labels=labels)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is not None and input_mask is None:
            input_mask = readable_tokens(attention_mask, labels)
        spliced, prompts, attention_mask = self._splice(input_ids, attention_mask, input_mask, adapter_names)
        if self.training and input_mask is None and prompts.routing is not None and prompts.embeds.requires_grad:
            raise PtmoeError(
                "training with neither labels nor input_mask: the router would average the answers in input_ids too, "
                "which it never sees in generation. Pass labels, or input_mask with the tokens that it may read; where "
                "a trainer keeps the labels (label smoothing, a loss function of its own, trl), use SFTTrainer from "
                "ptmoe.train.trl"
            )
        virtual = prompts.embeds.shape[1]
        result = PromptedOutput()
        result.routing = prompts.routing
        if labels is None:
            out = self.base_model(**self._inputs(spliced, prompts), **options)
            logits = out.logits[:, virtual:]
        else:
            rows, columns, targets = supervised_positions(labels, attention_mask)
            before = columns + (virtual - 1)  # the position that predicts each
            # A row without a prompt has nothing before its first token to predict it from.
            if prompts.lengths is not None or virtual == 0:
                predicted = (before >= 0) & spliced.attention_mask[rows, before.clamp(min=0)].bool()
                rows, before, targets = rows[predicted], before[predicted], targets[predicted]
            if self.training if skip_logits is None else skip_logits:
                logits = None
                result.loss, out = self._loss_alone(
                    spliced, prompts, (rows, before, targets), num_items_in_batch, token_statistics, options
                )
            else:
                out = self.base_model(**self._inputs(spliced, prompts), **options)
                scores, logits = out.logits[rows, before], out.logits[:, virtual:]
                result.loss = cross_entropy(scores, targets, num_items_in_batch)
                if token_statistics is not None:
                    token_statistics.add(scores, targets)
            if prompts.auxiliary_loss is not None and self.training:
                # Once for the global batch: this part's share of it.
                share = 1.0 if num_items_in_batch is None else len(targets) / num_items_in_batch
                result.loss = result.loss + share * prompts.auxiliary_loss
        if logits is not None:
            result.logits = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
        result.hidden_states, result.attentions = out.get("hidden_states"), out.get("attentions")
        return result

    def _loss_alone(
        self,
        spliced: Spliced,
        prompts: _Prompts,
        supervised: tuple[Tensor, Tensor, Tensor],
        num_items: Tensor | int | None,
        statistics: TokenStatistics | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """The loss and the base's output, computed from no more than they need.

        Args:
            spliced: the batch.
            prompts: in it.
            supervised: `(S,)` each: a row, the position in it that predicts, and what is to be predicted.
            num_items: as in `forward`.
            statistics: as in `forward`.
            options: of the base.
        """
        rows, columns, targets = supervised
        inputs = self._inputs(spliced, prompts)
        head = self.get_output_embeddings()
        size = max(1, LOGITS_AT_ONCE // self.config.get_text_config().vocab_size)
        packed = pack(spliced) if self._packs(spliced, prompts, options) else None
        layer = self._last_layer(options)  # the first time, both try the base out
        with ExitStack() as ways:
            ways.enter_context(by_onednn(self.base_model))
            if packed is not None:
                rows, columns = torch.zeros_like(rows), packed.places[rows, columns]
                inputs = {"inputs_embeds": packed.embeds, "position_ids": packed.position_ids}
                ways.enter_context(packed_attention(self.base_model, packed.groups))
            if layer is not None:
                ways.enter_context(narrowed(layer, rows, columns))
                rows, columns = torch.zeros_like(rows), torch.arange(len(rows), device=rows.device)
            if len(targets) > size and not any(parameter.requires_grad for parameter in head.parameters()):
                hidden = Hidden(self.base_model)
                with hidden.at(rows, columns):
                    out = self.base_model(**inputs, **options)
                if hidden.states is not None:
                    states, project = hidden.states, hidden.project
                    return cross_entropy_in_parts(states, targets, num_items, project, size, statistics), out
                logits = out.logits[rows, columns]
            else:
                with projected_at(head, rows, columns):
                    out = self.base_model(**inputs, **options)
                logits = out.logits[0]
        if statistics is not None:
            statistics.add(logits, targets)
        return cross_entropy(logits, targets, num_items), out

    def _last_layer(self, options: dict[str, Any]) -> nn.Module | None:
        """The layer that is computed at the supervised positions alone, where the base allows it."""
        if self._narrowable is None:
            self._narrowable = (last_layer(self.base_model),)
        (layer,) = self._narrowable
        # Recomputed or compiled, a layer is not run through the forward that stands there for this call alone.
        if layer is None or self.base_model.is_activation_checkpointing or layer._compiled_call_impl is not None:
            return None
        return None if options.get("output_hidden_states") or options.get("output_attentions") else layer

    def can_pack(self) -> bool:
        """Whether the loss is computed without padding; the first call tries it out on the base.

        Raises:
            PtmoeError: `packing=True`, and this base or method cannot.
        """
        if self.packing is False:
            return False
        if not self._packable:
            reason = why_not(self.base_model) if self._takes_positions else "it takes no position_ids"
            if reason is not None:
                said = f"rows cannot be packed with {type(self.base_model).__name__}: {reason}"
                if self.packing:
                    raise PtmoeError(f"{said}; leave packing out")
                if self._packable is None:
                    warnings.warn(f"{said}; padding costs time and memory", stacklevel=3)
            self._packable = reason is None
        if self.uses_adapter and self.method_config.fills_cache:
            if self.packing:
                raise PtmoeError(
                    f"{self.method_config.method} cannot be packed: its prompt stands in the cache of all rows; leave "
                    "packing out"
                )
            return False
        return self._packable

    def _packs(self, spliced: Spliced, prompts: _Prompts, options: dict[str, Any]) -> bool:
        """Whether this batch is computed without its padding."""
        if options.get("output_hidden_states") or options.get("output_attentions"):
            return False  # they are as wide as the batch
        if self.packing is None and (self._packable is False or bool(spliced.attention_mask.all())):
            return False
        return self.can_pack() and prompts.cache is None

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Routing | None:
        """How the active adapter routes these inputs `(B, L)`; None for a method that does not route."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.encode(self.get_input_embeddings()(input_ids), attention_mask.bool()).routing

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
        spliced, prompts, _ = self._splice(input_ids, attention_mask, input_mask, adapter_names)
        order = align_right(spliced.attention_mask)
        spliced = Spliced(
            spliced.embeds.gather(1, order[..., None].expand_as(spliced.embeds)),
            spliced.attention_mask.gather(1, order),
            spliced.position_ids.gather(1, order),
        )
        limit = self.max_positions
        virtual = prompts.length - prompts.embeds.shape[1]  # that stand in the cache
        room = None if limit is None else limit - virtual - int(spliced.attention_mask.sum(1).max())
        options, new = self._with_new_tokens(options, input_ids.shape[1], room)
        self._check_length(spliced, prompts, new)
        passed = self._inputs(spliced, prompts, self._copies(options) if virtual else 1)
        if virtual:  # transformers takes the cached positions off what it is given
            padding = spliced.embeds.new_zeros(len(spliced.embeds), virtual, spliced.embeds.shape[2])
            passed["inputs_embeds"] = torch.cat([padding, spliced.embeds], 1)
            if self._takes_positions:
                first = torch.arange(virtual, device=padding.device).expand(len(padding), -1)
                passed["position_ids"] = torch.cat([first, passed["position_ids"]], 1)
        return self.base_model.generate(input_ids, **passed, **options)

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
        spliced, prompts, _ = self._splice(input_ids, attention_mask, input_mask, None)
        self._check_length(spliced, prompts, new)
        return self._inputs(spliced, prompts)

    def fixed_prompts(self) -> Tensor | None:
        """`(N, T, H)`, prompts of which each input has exactly one before it, that of the highest gate; None where the
        active adapter composes a prompt for each input, or puts none before it."""
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


def _numbers(parameter: nn.Parameter) -> int:
    """How many numbers it holds: `bitsandbytes` packs two of 4 bits into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _new_tokens(bound: str, sources: list[dict[str, Any]], length: int) -> int | None:
    """The `"max"` or `"min"` of new tokens after an input of `length`, from the first source that has one."""
    for source in sources:
        if source.get(f"{bound}_new_tokens") is not None:
            return cast(int, source[f"{bound}_new_tokens"])
        if source.get(f"{bound}_length") is not None:
            return cast(int, source[f"{bound}_length"]) - length
    return None
