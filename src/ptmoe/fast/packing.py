"""Rows of a batch end to end in one, without their padding; each attends to itself alone.

Everything in a decoder but attention works token by token, so a padded batch spends time and memory on padding for
nothing. Packed, `B` rows of different lengths become one row of their real tokens, and positions restart with each.
Attention, the only place where tokens of a row meet, is computed on rows of similar length side by side, padded on the
right: there causality itself hides padding from every real token, and no mask is needed. Loss and gradients are those
of the padded batch.

A prompt that all rows share is computed once: nothing comes before it, so its hidden states are the same in each row.
In attention it stands before every row.

It needs a base whose attention goes through `transformers`' attention interface, and in which nothing else mixes
tokens. Both are tried out on the base itself (`packing_obstacle`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ptmoe.fast.attention import by_products, causal_products, products_obstacle
from ptmoe.fast.passes import recomputed_within
from ptmoe.fast.trial import evaluating

NAME = "ptmoe_packed"
SIMILAR, SHORT = 3 / 4, 64  # a row shorter than this fraction of its group's longest starts a new group, unless short
PROBED = (7, 5, 4)  # tokens of the rows that a base is tried out on
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; 2 % in other dtypes
# In those a row alone, whose matrix products have another shape, is off by up to 3 % on SmolLM2: each layer rounds.
ALONE = 0.1


class _CannotPackError(Exception):
    """What a base's attention needs and packed rows cannot give."""


@dataclass(frozen=True)
class Group:
    """Rows that attend side by side: tokens `start` to `stop` of the packed row.

    Attributes:
        start, stop: the group's part of the packed row.
        rows: their number, `longest` tokens each when padded.
        longest: tokens of the longest row.
        padded: `(rows · longest,)`, the index within the group of the token at each padded position, arbitrary at
            padding; None where all rows are equally long.
        real: `(stop - start,)`, the padded position of each token; None likewise.
        shared: of the packed row's first tokens, how many stand before each row.
    """

    start: int
    stop: int
    rows: int
    longest: int
    padded: Tensor | None
    real: Tensor | None
    shared: int = 0


@dataclass(frozen=True)
class Packed:
    """A batch without padding.

    Attributes:
        embeds: `(1, S, H)`: what the rows share, then their own tokens, the longest row first.
        position_ids: `(1, S)`, as in each row.
        rows: `(1, S)`, the row of the batch that each is of.
        places: `(B, T + L)`, the index in the packed row of each position of the padded batch; arbitrary at padding.
        groups: of rows of similar length, in order.
    """

    embeds: Tensor
    position_ids: Tensor
    rows: Tensor
    places: Tensor
    groups: tuple[Group, ...]


def pack(embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, shared: int = 0) -> Packed:
    """A padded batch, `(B, T + L, H)` and twice `(B, T + L)`, as one row; `shared` of the first real positions are the
    same in all rows."""
    mask = attention_mask.bool()
    batch, width = mask.shape
    nth = mask.cumsum(1) - 1  # real position of its row
    own, common = mask & (nth >= shared), mask & (nth < shared)
    lengths = own.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    flat = torch.arange(batch * width, device=mask.device).view(batch, width)
    chosen = torch.cat([flat[0][common[0]], flat[order][own[order]]])  # (S,)
    places = torch.zeros(batch * width, dtype=torch.long, device=mask.device)
    places[chosen] = torch.arange(len(chosen), device=mask.device)
    places = torch.where(common, nth, places.view(batch, width))
    return Packed(
        embeds.flatten(0, 1).index_select(0, chosen)[None],
        position_ids.flatten()[chosen][None],
        chosen[None] // width,
        places,
        groups_of(lengths[order].tolist(), mask.device, shared),
    )


def groups_of(lengths: Sequence[int], device: torch.device, shared: int = 0) -> tuple[Group, ...]:
    """Groups of rows of similar length.

    Args:
        lengths: of the rows, longest first; rows of length 0 are in no group.
        device: of the indices.
        shared: tokens that stand once before all rows, a group of their own, and are not counted in `lengths`.
    """
    lengths = [length for length in lengths if length]
    groups, begin, start = [], 0, shared
    if shared:
        groups.append(Group(0, shared, 1, shared, None, None))
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
        groups.append(Group(start, stop, end - begin, longest, padded, real, shared))
        begin, start = end, stop
    return tuple(groups)


class _Spread(torch.autograd.Function):
    """From a group's tokens to padded rows, `(1, S, h, d)` to `(1, rows · longest, h, d)`.

    Padding gets no gradient, so the backward pass is a selection as well, not a sum.
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
    """The inverse: from padded rows to the group's tokens."""

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
    """How the layers of a base attend while this context is entered; recomputed layers enter it again."""

    config: Any  # of the base, which names its attention implementation
    implementation: str  # the base's own
    groups: tuple[Group, ...]  # of the packed row
    products: bool  # whether short rows attend by plain products (`fast.attention`)
    calls: int = 0  # number of attention calls; `windows`, of those that passed a sliding window or None for it
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
        """An attention function of `transformers`: `(1, h, S, d)` each to `(1, S, h, d)`."""
        if attention_mask is not None or options.get("position_bias") is not None:
            raise _CannotPackError("its attention has a mask or a bias of its own")
        self.calls += 1
        self.windows += "sliding_window" in options
        attention = self._base_attention(module)
        parts = []
        for group in self.groups:
            queries, keys, values = (_to_rows(tensor.transpose(1, 2), group) for tensor in (query, key, value))
            hidden = self._mask(group.shared + group.longest, options.get("sliding_window"), query)
            attended: Tensor  # (rows, shared + longest, h, d)
            if self.products and hidden is None and by_products(module, queries, options):
                attended = causal_products(queries, keys, values, options.get("scaling")).transpose(1, 2)
            else:
                attended = attention(module, queries, keys, values, hidden, **options)[0]
            attended = attended[:, group.shared :].reshape(1, -1, *attended.shape[2:])
            parts.append(attended if group.real is None else _Gather.apply(attended, group.real))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None

    def _base_attention(self, module: nn.Module) -> Callable[..., Any]:
        if self.implementation != "eager":
            return cast(Callable[..., Any], ALL_ATTENTION_FUNCTIONS[self.implementation])
        try:
            return cast(Callable[..., Any], sys.modules[type(module).__module__].eager_attention_forward)
        except AttributeError:
            raise _CannotPackError("its attention does not go through transformers' interface") from None

    def _mask(self, length: int, window: int | None, like: Tensor) -> Tensor | None:
        """`(1, 1, length, length)`: the causal mask with a sliding window, for implementations that need one."""
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
    """`(1, S, h, d)` of all tokens to `(rows, h, shared + longest, d)` of a group."""
    part = tokens[:, group.start : group.stop]
    if group.padded is not None:
        part = _Spread.apply(part, group.padded, group.real)
    part = part.reshape(group.rows, group.longest, *part.shape[2:])
    if group.shared:
        part = torch.cat([tokens[:, : group.shared].expand(group.rows, -1, -1, -1), part], 1)
    return part.transpose(1, 2)


@contextmanager
def packed_attention(base: PreTrainedModel, groups: tuple[Group, ...]) -> Iterator[_Attention]:
    """Within it the rows of one packed row attend to themselves alone; layers that are recomputed in the backward pass,
    after it, do as well. The caller holds the base's lock, and sees to it that they do."""
    config = base.config.get_text_config()
    attention = _Attention(config, config._attn_implementation, groups, products_obstacle(base) is None)
    with recomputed_within(base, lambda: attention), attention:
        yield attention


def packing_obstacle(base: PreTrainedModel) -> str | None:
    """Why rows of this base cannot be packed; None where they can.

    Its own forward is tried on three short rows: packed; two of them packed behind another and in the other order,
    which shows whether a row's neighbours or its place matter to it; and each alone.
    """
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return "it takes no position_ids"
    config = base.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"its attention is {implementation!r}: needs 'sdpa' or 'eager'"
    embedding = base.get_input_embeddings()
    lengths = [PROBED[0], *PROBED]
    ids = torch.arange(sum(lengths), device=embedding.weight.device) * (len(embedding.weight) // sum(lengths))

    def logits(*rows: Tensor) -> Sequence[Tensor]:
        sizes = [row.shape[1] for row in rows]
        positions = torch.cat([torch.arange(size, device=ids.device) for size in sizes])[None]
        together: Tensor = base(inputs_embeds=torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
        return cast(Sequence[Tensor], together[0].float().split(sizes))

    try:
        with evaluating(base):  # the embedding, too: NEFTune adds noise to what it looks up in training
            other, *rows = embedding(ids[None]).split(lengths, 1)
            with packed_attention(base, groups_of(PROBED, ids.device)) as attention:
                packed = logits(*rows)
            with packed_attention(base, groups_of([PROBED[0], *PROBED[:0:-1]], ids.device)):
                moved = logits(other, *rows[:0:-1])
            alone = [logits(row)[0] for row in rows]
    except _CannotPackError as error:
        return str(error)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, LookupError, AttributeError) as error:
        return f"its forward does not take packed rows ({' '.join(str(error).split()):.100})"
    for found, expected, of_halves in ((moved[:0:-1], packed[1:], 0.02), (packed, alone, ALONE)):
        wanted = torch.cat(list(expected))
        error_size = float((torch.cat(list(found)) - wanted).norm() / wanted.norm())
        if not error_size <= TOLERANCE.get(base.dtype, of_halves):
            return f"its layers mix tokens of different rows (logits off by {error_size:.0%})"
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if attention.windows < attention.calls and any(limits):
        return "its sliding window is known to its masks alone"
    if attention.calls < config.num_hidden_layers:
        return "not all of its layers attend through transformers' interface"
    return None
