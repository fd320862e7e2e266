"""The key-value cache of a batch whose rows come and go.

    columns      start                 end
    row 0          .  .  k  k  k  k  k  k | room
    row 1          k  k  k  k  k  k  k  k |
    row 2          .  .  .  .  .  k  k  k |

Rows end at the same column and have their padding in front, so a step writes one column, a sliding window counts real
positions only, and the mask and explicit positions say the rest. A row that leaves gives its place to the last one; a
row that joins is copied in from the pass over its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 256  # columns allocated at a time


class Layer(DynamicLayer):
    """One layer's keys and values.

    Attributes:
        buffers: for keys and for values, `(places, heads, columns, d)` each; zeros but for the rows' own parts.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a new column, `(rows, heads, 1, d)`."""
        rows = self.rows
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: rows.count, :, rows.end] = new[:, :, 0]
        keys, values = (buffer[: rows.count, :, rows.start : rows.end + 1] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        return self.rows.width


class Rows:
    """The cache of a batch.

    Attributes:
        cache: for the base's forward pass.
        lengths: of the rows, in columns.
        start, end: the columns in use.
    """

    def __init__(self, config: Any) -> None:
        self.cache = DynamicCache(config=config)
        self.layers = [Layer(self) for _ in self.cache.layers]
        self.cache.layers = list(self.layers)
        self.lengths: list[int] = []
        self.start = self.end = 0

    @property
    def count(self) -> int:
        return len(self.lengths)

    @property
    def width(self) -> int:
        return self.end - self.start

    def join(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Add a row, from the keys and values `(heads, L, d)` of each layer."""
        length, row = layers[0][0].shape[1], self.count
        self._make_room(row + 1, max(self.width, length), layers)
        for layer, states in zip(self.layers, layers, strict=True):
            for buffer, new in zip(layer.buffers, states, strict=True):
                buffer[row].zero_()
                buffer[row, :, self.end - length : self.end] = new
        self.lengths.append(length)
        self.start = self.end - max(self.lengths)

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = self.lengths.pop()
        if row < self.count:
            part = slice(self.end - last, self.end)
            for layer in self.layers:
                for buffer in layer.buffers:
                    buffer[row].zero_()
                    buffer[row, :, part] = buffer[self.count, :, part]
            self.lengths[row] = last
        self.start = self.end - max(self.lengths, default=0)

    def clear(self) -> None:
        """Remove all rows."""
        self.lengths.clear()
        self.start = self.end

    def step(self, device: torch.device) -> dict[str, Any]:
        """The arguments of a forward pass that reads one token of each row, but the tokens; then `advance`."""
        self._make_room(self.count, self.width, [])
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        columns = torch.arange(self.width + 1, device=device)
        return {
            "attention_mask": (columns >= self.width - lengths).long(),
            "position_ids": lengths,
            "past_key_values": self.cache,
        }

    def advance(self) -> None:
        """The pass has added a column to each row."""
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _make_room(self, rows: int, width: int, like: list[tuple[Tensor, Tensor]]) -> None:
        """Buffers with places for so many rows, and `width` columns before `end` and one behind; like the keys and
        values of a row, where there are none yet."""
        buffers = self.layers[0].buffers
        places, columns = (buffers[0].shape[0], buffers[0].shape[2]) if buffers else (0, 0)
        if rows <= places and width <= self.end < columns:
            return
        if not self.count and rows <= places and width < columns:
            self.start = self.end = width
            return
        places = places if rows <= places else max(rows, 2 * places)
        end = max(width, self.width)
        for index, layer in enumerate(self.layers):
            old = layer.buffers
            models = like[index] if not old else [buffer[0] for buffer in old]
            layer.buffers = [one.new_zeros(places, one.shape[0], end + ROOM, one.shape[2]) for one in models]
            for new, was in zip(layer.buffers, old, strict=False):
                new[: self.count, :, end - self.width : end] = was[: self.count, :, self.start : self.end]
        self.start, self.end = end - self.width, end
