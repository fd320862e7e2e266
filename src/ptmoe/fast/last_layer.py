"""The last layer, computed at the supervised positions alone from its attention on.

Nothing reads what the last layer makes of the other positions: their part is to be attended to. In the usual layer
(Llama's, and of all that follow it) the feed-forward part is two thirds of the work, of one layer in eight or sixteen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ptmoe.fast.packing import AGREE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROBED = 6  # tokens that a base is tried out on


@contextmanager
def narrowed(layer: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within it `layer` gives `(1, S, H)`, what it makes of the positions `rows, columns (S,)`."""
    parts: Any = layer

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attended = parts.self_attn(hidden_states=parts.input_layernorm(hidden_states), **options)[0]
        kept = (hidden_states[rows, columns] + attended[rows, columns])[None]
        made: Tensor = kept + parts.mlp(parts.post_attention_layernorm(kept))
        return made

    vars(layer)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer)["forward"]


def last_layer(base: PreTrainedModel) -> nn.Module | None:
    """The last layer of a base that can be narrowed; None where that is not what the base computes.

    It is tried out: other models have the same parts and put them together in another way.
    """
    layers = getattr(base.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or {name for name, _ in layers[-1].named_children()} != PARTS:
        return None
    layer = layers[-1]
    if "forward" in vars(layer):  # another library has put its own there
        return None
    embedding = base.get_input_embeddings()
    ids = torch.arange(PROBED, device=embedding.weight.device)[None] * (len(embedding.weight) // PROBED)
    columns = torch.arange(0, PROBED, 2, device=ids.device)
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            whole = base(inputs_embeds=embedding(ids), use_cache=False).logits[0, columns].float()
            with narrowed(layer, torch.zeros_like(columns), columns):
                narrow = base(inputs_embeds=embedding(ids), use_cache=False).logits[0].float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    finally:
        base.train(was_training)
    if narrow.shape != whole.shape or not (narrow - whole).norm() <= AGREE.get(base.dtype, 0.02) * whole.norm():
        return None
    return layer
