"""The last layer, computed from its attention on at the supervised positions alone.

Nothing reads the last layer's output at other positions; they are only attended to. In the usual layer (Llama's, and
those of all that follow it) the feed-forward part is two thirds of the work, in one layer of eight or sixteen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.fast.compiled import replaceable
from ptmoe.fast.packing import TOLERANCE
from ptmoe.fast.trial import evaluating, standing_in

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROBED = 6  # tokens that a base is tried out on


@contextmanager
def last_layer_at(base: PreTrainedModel, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within it the last layer returns `(1, S, H)`, its output at the positions `rows, columns (S,)`."""
    layer: Any = _last_layer(base)

    def forward(hidden_states: Tensor, **options: Any) -> Tensor:
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)[0]
        kept = (hidden_states[rows, columns] + attended[rows, columns])[None]
        output: Tensor = kept + layer.mlp(layer.post_attention_layernorm(kept))
        return output

    with standing_in(layer, forward=forward):
        yield


def last_layer_obstacle(base: PreTrainedModel) -> str | None:
    """Why the last layer of this base cannot be computed at some positions only; None where it can.

    It is tried out: other models have parts of the same names and combine them in another way.
    """
    if (in_use := last_layer_in_use(base)) is not None:
        return in_use
    if _last_layer(base) is None:
        return "its last layer has other parts than Llama's"
    embedding = base.get_input_embeddings()
    ids = torch.arange(PROBED, device=embedding.weight.device)[None] * (len(embedding.weight) // PROBED)
    columns = torch.arange(0, PROBED, 2, device=ids.device)
    try:
        with evaluating(base):
            whole = base(inputs_embeds=embedding(ids), use_cache=False).logits[0, columns].float()
            with last_layer_at(base, torch.zeros_like(columns), columns):
                part = base(inputs_embeds=embedding(ids), use_cache=False).logits[0].float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"its last layer does not run at some positions only ({' '.join(str(error).split()):.100})"
    if part.shape != whole.shape or not (part - whole).norm() <= TOLERANCE.get(base.dtype, 0.02) * whole.norm():
        return "its last layer combines its parts in another way than Llama's"
    return None


def last_layer_in_use(base: PreTrainedModel) -> str | None:
    """Why the forward of the last layer cannot be replaced at present, whatever its kind."""
    if base.is_activation_checkpointing:
        return "layers are computed again in the backward pass"
    layer = _last_layer(base)
    if layer is not None and not replaceable(layer):
        return "its last layer is compiled, or another library has replaced its forward"
    return None


def _last_layer(base: PreTrainedModel) -> nn.Module | None:
    layers = getattr(base.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    return layers[-1] if {name for name, _ in layers[-1].named_children()} == PARTS else None
