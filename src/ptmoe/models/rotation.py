"""Bases whose rotation of all positions depends on how long the longest row is: LongRoPE, dynamic NTK.

    length ≤ switch                   length > switch
    every position rotated by θ       every position, the first ones too, rotated by θ'

So rows on either side of a switch go through the base apart, or each would be rotated by the longest; and where a row
passes a switch while it is generated, what the cache holds of it is read again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptmoe.fast.trial import standing_in


def switches(base: PreTrainedModel) -> tuple[int, ...]:
    """The lengths, in positions, above which all positions are rotated otherwise; none for most bases.

    What is named here by its config is tried out by `ptmoe.models.checks`.
    """
    config = base.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    limit = getattr(config, "max_position_embeddings", None)
    found: set[int | None] = set()
    for one in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        if one.get("rope_type") == "longrope":
            found.add(one.get("original_max_position_embeddings") or limit)
        elif one.get("rope_type") == "dynamic":
            found.add(limit)
    return tuple(sorted(switch for switch in found if switch))


def sides(lengths: Tensor, at: Sequence[int]) -> list[Tensor]:
    """The indices of the rows, `(n,)` each, that are on one side of every switch; `lengths (B,)` count their real and
    virtual positions."""
    if not at:
        return [torch.arange(len(lengths), device=lengths.device)]
    side = torch.bucketize(lengths, torch.tensor(at, device=lengths.device))  # a row as long as a switch is before it
    return [(side == one).nonzero().flatten() for one in side.unique().tolist()]


def joined(parts: Sequence[Any], rows: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """The base's output, of several parts of a batch these items, tensors `(n, …)` or tuples of them, rows in order."""
    if len(parts) == 1:
        return cast("dict[str, Any]", parts[0])
    back = torch.cat(list(rows)).argsort()

    def together(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)[back]
        return None if values[0] is None else tuple(together(list(of_layer)) for of_layer in zip(*values, strict=True))

    return {name: together([part.get(name) for part in parts]) for name in names}


@contextmanager
def reading_again(
    base: PreTrainedModel, lengths: Sequence[int], inputs: Callable[[Tensor], dict[str, Any]]
) -> Iterator[None]:
    """Within it the base's `generate` reads its rows from their beginning where they reach one of these lengths;
    `inputs` gives the arguments of the base's `forward` for token ids, `(B · beams, L)`."""
    own = base.prepare_inputs_for_generation

    @wraps(own)  # `generate` reads its signature
    def prepare(input_ids: Tensor, **options: Any) -> dict[str, Any]:
        prepared: dict[str, Any] = own(input_ids, **options)
        if options.get("is_first_iteration") or input_ids.shape[1] not in lengths:
            return prepared
        return prepared | {"input_ids": None, "past_key_values": None} | inputs(input_ids)

    with standing_in(base, prepare_inputs_for_generation=prepare):
        yield
