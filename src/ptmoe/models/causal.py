"""`PromptedCausalLM`: a base model and its adapters as one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput

from ptmoe.errors import PtmoeError
from ptmoe.fast.attention import products_obstacle, without_plans
from ptmoe.fast.loss import IGNORED, TokenStatistics, cross_entropy
from ptmoe.fast.passes import recomputed_within
from ptmoe.fast.paths import FastPaths, is_asked_for, is_sharded
from ptmoe.methods.base import Routing
from ptmoe.models.adapter_set import BASE, check_shapes
from ptmoe.models.checks import check_base, check_decoder
from ptmoe.models.generation import GeneratingModel
from ptmoe.models.greedy import stepping_obstacle
from ptmoe.models.input_path import checked_options
from ptmoe.models.prompts import Prompts
from ptmoe.models.rotation import joined, sides
from ptmoe.models.splice import Spliced, Supervised, align, divisor, predicting, within

OUTPUTS = ("logits", "hidden_states", "attentions")  # of a base


@dataclass
class PromptedOutput(ModelOutput):
    """The result of `PromptedCausalLM.forward`.

    Attributes:
        loss: mean cross-entropy over the supervised tokens.
        logits: `(B, L, V)`, aligned with `input_ids`: `logits[b, j]` scores what follows token `j`. None where they
            were skipped.
        hidden_states: of the base, virtual positions included, if asked for; where the base does not mask padding, each
            row's real positions come first.
        attentions: likewise.
        routing: the gate and probabilities `(B, N)`, for methods that route and rows of one adapter.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    # Attributes but not items: `Trainer` pads and joins every item over the batches of an evaluation.
    routing = cast("Routing | None", None)


class PromptedCausalLM(GeneratingModel):
    """A frozen causal language model whose input is preceded by a soft prompt composed for it, or whose layers a
    weight-side method (LoRA, …) has changed.

    Made by `attach` or `load_adapter`. It takes what a `transformers` model takes. The base is not part of
    `state_dict()`: checkpoints hold adapters only.

    A model may hold any number of prompts, also with changes of the layers for each row, and a batch may mix them. A
    weight-side method changes the layers for all rows, so a model holds one such adapter and no other. Several models
    on one base may run in several threads: each holds the base's lock while it runs layers, also ones computed again.

    Attributes:
        base_model: the frozen model; with a weight-side adapter, that adapter's parts are in it.
        adapters: the adapters (`AdapterSet`), and `encoders`, the encoder of each by name.
        active_adapter: the name of the one in use.
        packing: whether the loss is computed on the rows of a batch end to end, without their padding: None where the
            base allows it, True to insist, False for the padded batch. The loss is the same.
    """

    accepts_loss_kwargs = True  # `transformers.Trainer` then passes num_items_in_batch
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel, *, check: bool = True) -> None:
        check_decoder(base)
        super().__init__(base)
        self.packing: bool | None = None
        self._fast = FastPaths(base)
        if check:
            check_base(self)

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
            **options: go to the base model (`output_hidden_states`, …); `return_dict=False` gives a tuple.

        Raises:
            PtmoeError: shapes that do not agree, labels at padding, an unknown adapter, an input or a padded batch too
                long for the base, or training without the labels, or input_mask, that the adapter needs.
            ValueError: a routed row without an input token.
        """
        options = checked_options(self.base_model, input_ids, options, "forward")
        as_tuple = options.get("return_dict") is False
        options = {"use_cache": False, **options, "return_dict": True}
        kept = options.pop("logits_to_keep", 0)  # counts tokens of the input, as in transformers
        check_shapes(input_ids, attention_mask=attention_mask, labels=labels)
        num_items_in_batch = divisor(labels, attention_mask, num_items_in_batch)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is not None and input_mask is None:
            input_mask = readable_tokens(attention_mask, labels)
        spliced, prompts = self.compose(input_ids, attention_mask, input_mask, adapter_names)
        composed = prompts.embeds if prompts.cache is None else prompts.cache
        # `Trainer` counts the items of the labels that it keeps to itself, in training and in evaluation.
        scored = (self.training and composed.requires_grad) or num_items_in_batch is not None
        if scored and input_mask is None and self._reads_input(adapter_names):
            raise PtmoeError(
                f"{'training' if self.training else 'a loss'} with neither labels nor input_mask: the prompt would "
                "depend on the answers in input_ids, which are not there in generation. Pass labels, or input_mask "
                "with the tokens that decide it; where a trainer keeps the labels (label smoothing, a loss function "
                "of its own, trl), use SFTTrainer from ptmoe.train.trl"
            )
        if self.training and labels is None and prompts.auxiliary_loss is not None and torch.is_grad_enabled():
            raise PtmoeError(
                f"training without labels leaves out the loss that {self.method_config.method} adds to its own: pass "
                "labels; where a trainer keeps them (label_smoothing_factor, a loss function of its own), leave it out"
            )
        chosen, width = self.path.chosen, spliced.embeds.shape[1]
        if chosen is not None and width > chosen and not bool(spliced.attention_mask.all()):
            raise PtmoeError(
                f"a padded batch of {width} positions on a base whose attention chooses {chosen}: it would choose "
                "padding as well; give it rows of one length, or one row at a time"
            )
        every = prompts.lengths is None and prompts.embeds.shape[1] > 0  # each row's first token has a predictor
        supervised = None if labels is None else predicting(spliced, labels, attention_mask, every=every)
        loss = logits = place = None
        if not self.path.left_padding:
            order = align(spliced.attention_mask, "left")
            spliced, place = spliced.reordered(order), order.argsort(1)
            if supervised is not None:
                rows, before, targets = supervised
                supervised = rows, place[rows, before], targets
        with self.lock, without_plans(self.base_model), recomputed_within(self.base_model, lambda: self.lock):
            if supervised is not None and (self.training if skip_logits is None else skip_logits):
                loss, out = self._loss(spliced, prompts, supervised, num_items_in_batch, token_statistics, options)
            else:
                out = self._outputs(spliced, prompts, options)
                scores = out["logits"]
                if place is not None:
                    scores = scores.gather(1, place[..., None].expand(-1, -1, scores.shape[2]))
                scores = scores[:, prompts.embeds.shape[1] :]
                logits = scores[:, -kept:] if isinstance(kept, int) else scores[:, kept]
        if supervised is not None:
            rows, before, targets = supervised
            if loss is None:
                scores = out["logits"][rows, before]
                loss = cross_entropy(scores, targets, num_items_in_batch)
                if token_statistics is not None:
                    token_statistics.add(scores, targets)
            if prompts.auxiliary_loss is not None and self.training:
                # Once for the global batch: this part's share of it.
                share = 1.0 if num_items_in_batch is None else len(targets) / num_items_in_batch
                loss = loss + (share * prompts.auxiliary_loss).to(loss.device)
        # At once: its items, by which it is unpacked and indexed, stand in the order in which they are set.
        result = PromptedOutput(loss, logits, out.get("hidden_states"), out.get("attentions"))
        result.routing = prompts.routing
        return cast(PromptedOutput, result.to_tuple()) if as_tuple else result

    def _outputs(self, spliced: Spliced, prompts: Prompts, options: dict[str, Any]) -> dict[str, Any]:
        """The base's output, from a pass over the rows on each side of its switches."""
        parts = self._parts(spliced, prompts)
        inputs = [self.base_inputs(part, of_part) for _, part, of_part in parts]
        return joined([self.base_model(**one, **options) for one in inputs], [rows for rows, *_ in parts], OUTPUTS)

    def _loss(
        self,
        spliced: Spliced,
        prompts: Prompts,
        supervised: Supervised,
        num_items: Tensor | int | None,
        statistics: TokenStatistics | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, and the base's output without logits, from passes as in `_outputs`."""
        parts = self._parts(spliced, prompts)
        made = [
            self._fast.loss(
                self.base_inputs(part, of_part),
                supervised if len(parts) == 1 else within(rows, supervised),
                max(len(supervised[0]), 1) if num_items is None else num_items,
                packed=self._packs(part, of_part, options),
                shared=of_part.length if of_part.shared else 0,
                whole=of_part.changes is not None or self._last_layer_obstacle() is not None,
                statistics=statistics,
                options=options,
            )
            for rows, part, of_part in parts
        ]
        losses, outs = zip(*made, strict=True)
        return sum(losses[1:], losses[0]), joined(outs, [rows for rows, *_ in parts], OUTPUTS[1:])

    def _parts(self, spliced: Spliced, prompts: Prompts) -> list[tuple[Tensor, Spliced, Prompts]]:
        """Rows, `(n,)`, that the base rotates alike, and what it reads of them."""
        rows = sides(spliced.attention_mask.sum(1) + prompts.cached_length, self.path.switches)
        if len(rows) == 1:
            return [(rows[0], spliced, prompts)]
        if is_sharded(self.base_model):
            raise PtmoeError(
                f"{type(self.base_model).__name__} is sharded over processes, which take a pass together, and rotates "
                f"rows of up to {self.path.switches[0]} positions and longer ones apart: give it batches of either"
            )
        return [(one, spliced.rows(one), prompts.rows(one)) for one in rows]

    def fast_paths(self) -> dict[str, str | None]:
        """Each fast path by name, and why it is not taken with this base and adapter; None where it is.

        The first call tries some of them out on the base, a few tokens each.
        """
        with self.lock:
            obstacles = self._fast.obstacles()
        obstacles["packing"] = obstacles["packing"] or self._packing_obstacle()
        if self.packing is False:
            obstacles["packing"] = "not asked for (packing=False)"
        obstacles["last_layer"] = obstacles["last_layer"] or self._last_layer_obstacle()
        return obstacles | {"stepwise_decoding": stepping_obstacle(self.base_model, self.path)}

    def can_pack(self) -> bool:
        """Whether the loss is computed without padding; the first call tries it out on the base.

        Raises:
            PtmoeError: `packing=True`, and this base or method cannot.
        """
        if self.packing is False:
            return False
        with self.lock:
            reason = self._fast.packing_obstacle()
        if reason is not None and self.packing:
            raise PtmoeError(
                f"rows cannot be packed with {type(self.base_model).__name__}: {reason}; leave packing out"
            )
        if reason is None and (reason := self._packing_obstacle()) is not None and self.packing:
            what = self.method_config.method if self.active_adapter else type(self.base_model).__name__
            raise PtmoeError(f"{what} cannot be packed: {reason}; leave packing out")
        return reason is None

    def _reads_input(self, adapter_names: Sequence[str] | None) -> bool:
        """Whether the prompt of one of these adapters, or of the active one, depends on the input."""
        names = set(adapter_names or [self.active_adapter]) - {BASE, ""} if self.adapters.enabled else set()
        return any(config.reads_input or config.routes for config in (self.adapters[name].config for name in names))

    def _packing_obstacle(self) -> str | None:
        if self.path.per_layer is not None:
            return "the base takes inputs for each layer beside the embeddings"
        fills_cache = self.uses_adapter and self.method_config.fills_cache
        return self._rows_obstacle() or ("its prompt is in the key-value cache" if fills_cache else None)

    def _last_layer_obstacle(self) -> str | None:
        own = self.uses_adapter and self.method_config.changes_rows
        return "each row of a batch changes the layers in its own way" if own else self._rows_obstacle()

    def _rows_obstacle(self) -> str | None:
        divided = self.uses_adapter and self.method_config.divides_rows
        return "rows of a batch train different parameters" if divided else None

    def _packs(self, spliced: Spliced, prompts: Prompts, options: dict[str, Any]) -> bool:
        """Whether this batch is computed without its padding."""
        if is_asked_for(self.base_model, ("output_hidden_states", "output_attentions"), options):
            return False  # they are as wide as the batch
        # On a GPU small bases are bound by the number of kernels, which a packed batch has more of.
        gains = prompts.shared and self.device.type == "cpu"
        if self.packing is None and not gains and products_obstacle(self.base_model) and spliced.attention_mask.all():
            return False
        return self.can_pack() and prompts.cache is None


# `transformers.Trainer` shifts the labels of label smoothing for the classes named here alone, and `pipeline` asks.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ptmoe"] = PromptedCausalLM.__name__


def readable_tokens(attention_mask: Tensor, labels: Tensor) -> Tensor:
    """`(B, L)`, true at the real tokens before each row's first supervised one: what the router may read."""
    supervised = (labels != IGNORED) & attention_mask.bool()
    return attention_mask.bool() & (supervised.long().cumsum(1) == 0)
