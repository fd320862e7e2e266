"""Rows of a batch end to end in one, without their padding; each attends to itself alone.

Everything in a decoder but attention works token by token, so a padded batch spends time and memory on padding for
nothing. Packed, `B` rows of different lengths are one row of their real tokens, positions start anew with each, and
attention, which is what tokens of one row share, is computed on rows of similar length side by side, padded on the
right: there causality itself hides padding from every real token, and no mask is needed. Loss and gradients are those
of the padded batch.

It needs a base whose attention goes through `transformers`' attention interface, and in which nothing else mixes
tokens. Both are tried out on the base itself, once (`why_not`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptmoe.models.splice import Spliced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ptmoe_packed"
SIMILAR, SHORT = 3 / 4, 64  # a shorter row than this part of the longest goes into another group, unless all are short
PROBED = (7, 4, 5)  # tokens of the rows that a base is tried out on
AGREE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; of other dtypes 2 %, tokens of another row make far more


class _CannotPackError(Exception):
    """Of a base's attention."""


@dataclass(frozen=True)
class Group:
    """Rows that attend side by side: tokens `start` to `stop` of the packed row.

    Attributes:
        rows: how many, `longest` tokens each when padded.
        padded: `(rows · longest,)`, which of the group's tokens stands at each place; any, where there is none.
        real: `(stop - start,)`, the place of each of its tokens. Both None where all rows are equally long.
    """

    start: int
    stop: int
    rows: int
    longest: int
    padded: Tensor | None
    real: Tensor | None


@dataclass(frozen=True)
class Packed:
    """A batch without padding.

    Attributes:
        embeds: `(1, S, H)`, the longest row first.
        position_ids: `(1, S)`, from 0 in each row.
        places: `(B, T + L)`, where a position of the padded batch went; where it is padding, the number says nothing.
        groups: of rows of similar length, in order.
    """

    embeds: Tensor
    position_ids: Tensor
    places: Tensor
    groups: tuple[Group, ...]


def pack(spliced: Spliced) -> Packed:
    """A padded batch as one row."""
    mask = spliced.attention_mask.bool()
    batch, width = mask.shape
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    flat = torch.arange(batch * width, device=mask.device).view(batch, width)
    chosen = flat[order][mask[order]]  # (S,)
    places = torch.zeros(batch * width, dtype=torch.long, device=mask.device)
    places[chosen] = torch.arange(len(chosen), device=mask.device)
    return Packed(
        spliced.embeds.flatten(0, 1).index_select(0, chosen)[None],
        spliced.position_ids.flatten()[chosen][None],
        places.view(batch, width),
        groups_of(lengths[order].tolist(), mask.device),
    )


def groups_of(lengths: Sequence[int], device: torch.device) -> tuple[Group, ...]:
    """Groups of rows of similar length.

    Args:
        lengths: of the rows, falling; those of 0 have no place.
        device: of the indices.
    """
    lengths = [length for length in lengths if length]
    groups, begin, start = [], 0, 0
    while begin < len(lengths):
        longest = lengths[begin]
        end = begin + 1
        while end < len(lengths) and (longest <= SHORT or lengths[end] >= SIMILAR * longest):
            end += 1
        chosen = torch.tensor(lengths[begin:end])
        stop = start + int(chosen.sum())
        padded = real = None
        if lengths[end - 1] < longest:
            place = torch.arange(longest)
            first = chosen.cumsum(0) - chosen
            real = (place < chosen[:, None]).flatten().nonzero().flatten().to(device)
            padded = (first[:, None] + place.clamp(max=lengths[end - 1] - 1)).flatten()
            padded[real.cpu()] = torch.arange(stop - start)
            padded = padded.to(device)
        groups.append(Group(start, stop, end - begin, longest, padded, real))
        begin, start = end, stop
    return tuple(groups)


class _Spread(torch.autograd.Function):
    """From a group's tokens to padded rows, `(1, S, h, d)` to `(1, rows · longest, h, d)`.

    What stands in padding gets no gradient, so the way back is a selection as well, and not a sum.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, padded: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return tokens.index_select(1, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (real,) = ctx.saved_tensors
        return gradient.index_select(1, real), None, None


class _Gather(torch.autograd.Function):
    """The way back from padded rows to the group's tokens."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        ctx.length = rows.shape[1]
        return rows.index_select(1, real)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (real,) = ctx.saved_tensors
        whole = gradient.new_zeros(1, ctx.length, *gradient.shape[2:])
        return whole.index_copy_(1, real, gradient), None


@dataclass
class _Attention:
    """How the layers of a base attend, for as long as it is entered; may be entered again, for recomputed layers.

    Attributes:
        config: of the base, which says by name how its layers attend.
        implementation: its own.
        groups: of the packed row.
        calls: of an attention; `windows`, of those which said whether they have a sliding window.
    """

    config: Any
    implementation: str
    groups: tuple[Group, ...]
    calls: int = 0
    windows: int = 0

    def __enter__(self) -> _Attention:
        self.config._attn_implementation = NAME
        self.token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self.token)
        self.config._attn_implementation = self.implementation

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """As every attention function of `transformers`: `(1, h, S, d)` each to `(1, S, h, d)`."""
        if attention_mask is not None or options.get("position_bias") is not None:
            raise _CannotPackError("its attention has a mask or a bias of its own")
        self.calls += 1
        self.windows += "sliding_window" in options
        own = self._own(module)
        parts = []
        for group in self.groups:
            rows = [_to_rows(tensor.transpose(1, 2), group) for tensor in (query, key, value)]
            hidden = self._mask(group.longest, options.get("sliding_window"), query)
            made: Tensor = own(module, *rows, hidden, **options)[0]  # (rows, longest, h, d)
            made = made.reshape(1, -1, *made.shape[2:])
            parts.append(made if group.real is None else _Gather.apply(made, group.real))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None

    def _own(self, module: nn.Module) -> Callable[..., Any]:
        if self.implementation != "eager":
            return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[self.implementation])
        try:
            return cast(Callable[..., Any], sys.modules[type(module).__module__].eager_attention_forward)
        except AttributeError:
            raise _CannotPackError("its attention does not go through transformers' interface") from None

    def _mask(self, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """`(1, 1, length, length)`: what causality and a sliding window hide, where the attention needs to be told."""
        if "flash" in self.implementation:
            return None  # it reads the window from its own argument
        window = None if window is not None and length <= window else window
        if self.implementation == "sdpa" and window is None:
            return None
        place = torch.arange(length, device=like.device)
        distance = place[:, None] - place
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        if self.implementation == "sdpa":
            return seen[None, None]
        hidden = torch.zeros(length, length, dtype=like.dtype, device=like.device)
        return hidden.masked_fill(~seen, torch.finfo(like.dtype).min)[None, None]


_current: ContextVar[_Attention] = ContextVar("ptmoe_packed_attention")


def _attend(module: nn.Module, *tensors: Any, **options: Any) -> tuple[Tensor, None]:
    return _current.get().attend(module, *tensors, **options)


# Among the attention functions but not among those of masks: `transformers` then makes none.
ALL_ATTENTION_FUNCTIONS.register(NAME, torch.compiler.disable(_attend))


def _to_rows(tokens: Tensor, group: Group) -> Tensor:
    """`(1, S, h, d)` of all tokens to `(rows, h, longest, d)` of a group."""
    part = tokens[:, group.start : group.stop]
    if group.padded is not None:
        part = _Spread.apply(part, group.padded, group.real)
    return part.reshape(group.rows, group.longest, *part.shape[2:]).transpose(1, 2)


@contextmanager
def packed_attention(base: PreTrainedModel, groups: tuple[Group, ...]) -> Iterator[_Attention]:
    """Within it the rows of one packed row attend to themselves alone; layers that are recomputed in the backward pass,
    after it, do as well."""
    config = base.config.get_text_config()
    attention = _Attention(config, config._attn_implementation, groups)
    recomputed = {
        module: cast(Any, module)._gradient_checkpointing_func
        for module in (base.modules() if base.is_activation_checkpointing else ())
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    }
    for module, function in recomputed.items():
        cast(Any, module)._gradient_checkpointing_func = partial(
            function, use_reentrant=False, context_fn=lambda: (nullcontext(), attention)
        )
    try:
        with attention:
            yield attention
    finally:
        for module, function in recomputed.items():
            cast(Any, module)._gradient_checkpointing_func = function


@torch.no_grad()
def why_not(base: PreTrainedModel) -> str | None:
    """Why rows of this base cannot be packed; None where they can.

    Its own forward is tried on three short rows, packed and each alone.
    """
    config = base.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager") and "flash" not in str(implementation):
        return f"its attention is {implementation!r}"
    embedding = base.get_input_embeddings()
    count = sum(PROBED)
    ids = torch.arange(count, device=embedding.weight.device) * (len(embedding.weight) // count)
    embeds = embedding(ids)[None]
    positions = torch.cat([torch.arange(length) for length in PROBED]).to(ids.device)[None]
    was_training = base.training
    base.eval()
    try:
        with packed_attention(base, groups_of(PROBED, ids.device)) as attention:
            packed = base(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[0]
        alone = [
            base(inputs_embeds=part, position_ids=place, use_cache=False).logits[0]
            for part, place in zip(embeds.split(PROBED, 1), positions.split(PROBED, 1), strict=True)
        ]
    except _CannotPackError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, LookupError, AttributeError) as error:
        return f"its forward does not take packed rows ({' '.join(str(error).split()):.100})"
    finally:
        base.train(was_training)
    expected = torch.cat(alone).float()
    off = float((packed.float() - expected).norm() / expected.norm())
    if not off <= AGREE.get(base.dtype, 0.02):
        return f"its layers mix tokens of different rows (logits off by {off:.0%})"
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if attention.windows < attention.calls and any(limits):
        return "its sliding window is known to its masks alone"
    if attention.calls < config.num_hidden_layers:
        return "not all of its layers attend through transformers' interface"
    return None
