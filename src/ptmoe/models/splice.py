"""Where the prompt goes in a padded batch: right before each row's first real token.

A row of `L` tokens, the first real one at `s`, and a prompt of `t ≤ T` virtual tokens become `T + L` positions:

    [x_0 .. x_{s-1}, padding (T - t), P_1 .. P_t, x_s .. x_{L-1}]

so left-padded, right-padded and unpadded rows share one rule: token `x_j` of the input (`j ≥ s`) is always at position
`T + j`, and what predicts it is always at `T + j - 1`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.loss import IGNORED, supervised_positions

Supervised = tuple[Tensor, Tensor, Tensor]  # row, position that predicts, token to be predicted; (S,) each


@dataclass
class Spliced:
    """A batch as the base model sees it."""

    embeds: Tensor  # `(B, T + L, H)`
    attention_mask: Tensor  # `(B, T + L)`, 1 at virtual and real tokens
    position_ids: Tensor  # `(B, T + L)`, counting virtual and real tokens only; 0 at padding
    token_ids: Tensor | None = None  # `(B, T + L)`, a placeholder at virtual tokens; None where the base needs none

    def rows(self, index: Tensor) -> Spliced:
        """Some rows, `(n,)`."""
        ids = None if self.token_ids is None else self.token_ids[index]
        return Spliced(self.embeds[index], self.attention_mask[index], self.position_ids[index], ids)

    def reordered(self, order: Tensor) -> Spliced:
        """Each row's positions in this order, `(B, T + L)`."""
        return Spliced(
            self.embeds.gather(1, order[..., None].expand_as(self.embeds)),
            self.attention_mask.gather(1, order),
            self.position_ids.gather(1, order),
            None if self.token_ids is None else self.token_ids.gather(1, order),
        )


def splice(prompt: Tensor, lengths: Tensor | None, embeds: Tensor, attention_mask: Tensor) -> Spliced:
    """Put each row's prompt before its first real token.

    Args:
        prompt: `(B, T, H)`; row `b` holds its virtual tokens in its *last* `lengths[b]` positions.
        lengths: `(B,)`, or None where every row has all `T`.
        embeds: `(B, L, H)`.
        attention_mask: `(B, L)`, nonzero at real tokens.
    """
    batch, length, _ = embeds.shape
    total = prompt.shape[1]
    real = attention_mask.bool()
    first = torch.where(real.any(1), real.int().argmax(1), length)  # (B,)
    position = torch.arange(total + length, device=embeds.device)  # (T + L,)
    joined = torch.cat([prompt.to(embeds.dtype), embeds], 1)
    virtual = prompt.new_ones(batch, total, dtype=torch.bool)
    if lengths is not None:
        virtual = position[:total] >= total - lengths[:, None]
    mask = torch.cat([virtual, real], 1)
    if first.any():  # a row's padding on the left is brought before its prompt
        source = torch.where(position < first[:, None], total + position, position - first[:, None])
        source = torch.where(position < total + first[:, None], source, position)  # (B, T + L)
        joined = joined.gather(1, source[..., None].expand_as(joined))
        mask = mask.gather(1, source)
    positions = mask.long().cumsum(1) - 1
    return Spliced(joined, mask.to(attention_mask.dtype), positions.masked_fill(~mask, 0))


def align(mask: Tensor, side: str) -> Tensor:
    """Per-row order `(B, S)` that moves masked-out positions to the other end and keeps the rest: to the `"right"` for
    generation, which needs every row to end at the last position, whichever side was padded."""
    moved = mask.bool() if side == "right" else ~mask.bool()
    return moved.to(torch.uint8).argsort(dim=1, stable=True)


def divisor(
    labels: Tensor | None, attention_mask: Tensor | None, num_items: Tensor | int | None
) -> Tensor | int | None:
    """What the loss is divided by: `num_items`, or 1 where it is 0 and so is the loss.

    Args:
        labels, attention_mask: `(B, L)`.
        num_items: supervised tokens of the global batch, counted by whoever gives the labels.

    Raises:
        PtmoeError: labels at padding, which are not trained on, have been counted: the loss would be too small.
    """
    if num_items is None:
        return None
    if labels is not None and attention_mask is not None and ((labels != IGNORED) & ~attention_mask.bool()).any():
        raise PtmoeError("labels at padding would be counted and not trained on: set them to -100, as at the prompt")
    return num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)


def predicting(spliced: Spliced, labels: Tensor, attention_mask: Tensor, *, every: bool) -> Supervised:
    """What is supervised, by row and the position in `spliced` that predicts it.

    Args:
        spliced: from `splice`.
        labels: `(B, L)`, -100 at what is not supervised.
        attention_mask: `(B, L)`, of the input.
        every: all of it is predicted; else a row without a prompt has nothing before its first token to predict it.
    """
    rows, columns, targets = supervised_positions(labels, attention_mask)
    place = torch.arange(spliced.embeds.shape[1], device=columns.device)
    # Where the mask has a gap, what predicts is the last token before it; -1 where there is none.
    last = torch.where(spliced.attention_mask.bool(), place, -1).cummax(1).values
    before = nn.functional.pad(last, (1, 0), value=-1)[rows, columns + (len(place) - labels.shape[1])]
    if not every:
        predicted = before >= 0
        rows, before, targets = rows[predicted], before[predicted], targets[predicted]
    return rows, before, targets


def within(index: Tensor, supervised: Supervised) -> Supervised:
    """What is supervised in some rows, `(n,)` ascending, numbered anew."""
    rows, before, targets = supervised
    chosen = torch.isin(rows, index)
    return torch.searchsorted(index, rows[chosen]), before[chosen], targets[chosen]
