"""`FastPaths`: which fast paths a base allows, and the loss computed along them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.fast.attention import attention_obstacle, products_obstacle, without_plans
from ptmoe.fast.compiled import compilation_obstacle
from ptmoe.fast.hidden import Hidden, decoder_of
from ptmoe.fast.last_layer import last_layer_at, last_layer_in_use, last_layer_obstacle
from ptmoe.fast.linear import gapless_head, onednn_obstacle, use_onednn
from ptmoe.fast.loss import LOGITS_AT_ONCE, TokenStatistics, cross_entropy, cross_entropy_in_parts, projected_at
from ptmoe.fast.packing import pack, packed_attention, packing_obstacle
from ptmoe.fast.passes import CHANGES

# What a base is asked for, by the call or its config, of every position in every layer.
EVERY_POSITION = ("output_hidden_states", "output_attentions", "output_router_logits")


@contextmanager
def fast_kernels(base: PreTrainedModel) -> Iterator[None]:
    """Within it `base` runs on the kernels that are faster here: oneDNN's on a CPU, on a GPU those without plans, and
    in the head those for rows without gaps."""
    with use_onednn(base), without_plans(base), gapless_head(base):
        yield


def is_sharded(base: nn.Module) -> bool:
    """Whether each process holds a part of the base, by DeepSpeed or FSDP, so that a pass takes all of them."""
    return hasattr(base, "unshard") or any(hasattr(parameter, "ds_id") for parameter in base.parameters())


def is_asked_for(base: PreTrainedModel, outputs: Iterable[str], options: dict[str, Any]) -> bool:
    """Whether the options of a call, or else the base's config, ask for one of these outputs."""
    config = base.config.get_text_config()
    return any(options.get(name, getattr(config, name, False)) for name in outputs)


class FastPaths:
    """The fast paths of one base. What has to be tried out is tried once; a path that cannot be taken is named once.

    Args:
        base: the frozen model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._tried: dict[str, str | None] = {}
        self._decoder: nn.Module | None = None

    def packing_obstacle(self) -> str | None:
        """As `ptmoe.fast.packing.packing_obstacle`, tried once."""
        message = "rows cannot be packed with {}: {}; padding costs time and memory"
        return self._once("packing", packing_obstacle, message)

    def last_layer_obstacle(self) -> str | None:
        """As `ptmoe.fast.last_layer.last_layer_obstacle`, its trial once."""
        message = "the last layer of {} is computed at every position: {}"
        return last_layer_in_use(self.base) or self._once("last_layer", last_layer_obstacle, message)

    def parts_obstacle(self) -> str | None:
        """Why many logits are not computed in parts, tried out once; None where they are."""
        if is_sharded(self.base):  # in each process another number of times
            return "each part would gather the weights of the head from all processes"

        def obstacle(base: PreTrainedModel) -> str | None:
            self._decoder = decoder_of(base)
            return "its logits follow from more than the last hidden states" if self._decoder is None else None

        return self._once("parts", obstacle, "the logits of {} are computed all at once: {}")

    def obstacles(self) -> dict[str, str | None]:
        """Each path by name, and what keeps it from being taken; None where it is taken."""
        return {
            "packing": self.packing_obstacle(),
            "last_layer": self.last_layer_obstacle(),
            "onednn": onednn_obstacle(self.base),
            "without_cudnn_attention": attention_obstacle(self.base),
            "attention_by_products": products_obstacle(self.base),
            "compiled_layers": compilation_obstacle(self.base),
            "loss_in_parts": self.parts_obstacle(),
        }

    def loss(
        self,
        inputs: dict[str, Any],
        supervised: tuple[Tensor, Tensor, Tensor],
        num_items: Tensor | int | None,
        *,
        packed: bool,
        shared: int = 0,
        whole: bool = False,
        statistics: TokenStatistics | None = None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Any]:
        """The loss of a batch and the base's output, computed from no more than they need.

        Args:
            inputs: of the base: `inputs_embeds (B, T + L, H)`, `attention_mask` and `position_ids (B, T + L)`, …
            supervised: `(S,)` each: the row, the position in it that predicts, and the token to be predicted.
            num_items: supervised tokens of the global batch, as in `cross_entropy`.
            packed: leave out the padding.
            shared: how many of each row's first real positions are the same in all rows, and computed once in packed
                ones.
            whole: compute the last layer at every position.
            statistics: told of the supervised tokens' predictions.
            options: of the base.
        """
        rows, columns, targets = supervised
        base, head = self.base, self.base.get_output_embeddings()
        size = max(1, LOGITS_AT_ONCE // base.config.get_text_config().vocab_size)
        whole = whole or is_asked_for(base, EVERY_POSITION, options)
        at_some = not whole and self.last_layer_obstacle() is None
        in_parts = len(targets) > size and not any(parameter.requires_grad for parameter in head.parameters())
        decoder = self._decoder if in_parts and self.parts_obstacle() is None else None
        with ExitStack() as paths:
            paths.enter_context(use_onednn(base))
            if packed:
                batch = pack(inputs["inputs_embeds"], inputs["attention_mask"], inputs["position_ids"], shared)
                rows, columns = torch.zeros_like(rows), batch.places[rows, columns]
                packs: dict[str, Any] = {"inputs_embeds": batch.embeds, "position_ids": batch.position_ids}
                if CHANGES in inputs:
                    packs[CHANGES] = inputs[CHANGES].packed(batch.rows)
                inputs = packs
                paths.enter_context(packed_attention(base, batch.groups))
            if at_some:
                paths.enter_context(last_layer_at(base, rows, columns))
                rows, columns = torch.zeros_like(rows), torch.arange(len(rows), device=rows.device)
            if decoder is not None:
                hidden = Hidden(base, decoder)
                with hidden.at(rows, columns):
                    out = base(**inputs, **options)
                states, project = hidden.states, hidden.project
                return cross_entropy_in_parts(states, targets, num_items, project, size, statistics), out
            with projected_at(head, rows, columns):
                out = base(**inputs, **options)
            logits = out.logits[0]
        if statistics is not None:
            statistics.add(logits, targets)
        return cross_entropy(logits, targets, num_items), out

    def _once(self, path: str, obstacle: Callable[[PreTrainedModel], str | None], message: str) -> str | None:
        if path not in self._tried:
            self._tried[path] = reason = obstacle(self.base)
            if reason is not None:
                warnings.warn(message.format(type(self.base).__name__, reason), stacklevel=5)
        return self._tried[path]
