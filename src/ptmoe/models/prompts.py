"""The prompts of a batch, as its adapters compose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptmoe.fast.passes import Changes
from ptmoe.methods.base import Prompt, Routing


@dataclass
class Prompts:
    """The prompts of a batch.

    Attributes:
        embeds: `(B, T, H)` in float32, aligned to the right.
        lengths: `(B,)`, virtual tokens of each row; None where all have `T`.
        routing: as in `ptmoe.methods.Prompt`, where all rows share one adapter; likewise the following.
        cache: `(layers, 2, B or 1, heads, T, d)`.
        auxiliary_loss: a scalar.
        changes: of the base's layers; likewise where adapters are mixed, or some rows have none.
    """

    embeds: Tensor
    lengths: Tensor | None = None
    routing: Routing | None = None
    cache: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    changes: Changes | None = None

    @property
    def cached_length(self) -> int:
        """Virtual tokens that are keys and values instead of embeddings."""
        return 0 if self.cache is None else self.cache.shape[4]

    @property
    def shared(self) -> bool:
        """Whether several rows have one prompt of embeddings, as `expand` makes it."""
        return len(self.embeds) > 1 and self.embeds.stride(0) == 0 and self.embeds.shape[1] > 0

    @property
    def length(self) -> int:
        """Positions that the longest prompt takes."""
        return self.embeds.shape[1] + self.cached_length

    def rows(self, index: Tensor) -> Prompts:
        """Those of some rows, `(n,)`, which may repeat."""
        lengths = None if self.lengths is None else self.lengths[index]
        cache = self.cache
        if cache is not None and cache.shape[2] > 1:  # of 1, all rows share it
            cache = cache[:, :, index]
        changes = None if self.changes is None else self.changes[index]
        return Prompts(self.embeds[index], lengths, cache=cache, changes=changes)

    @classmethod
    def mixed(cls, embeds: Tensor, parts: Sequence[tuple[Tensor, Prompt]]) -> Prompts:
        """Those of a batch `embeds (B, L, H)` whose rows are of several adapters, from the rows `(n,)` of each adapter
        and its prompts for them; the other rows get none."""
        longest = max((prompt.embeds.shape[1] for _, prompt in parts), default=0)
        whole = embeds.new_zeros(len(embeds), longest, embeds.shape[2], dtype=torch.float32)
        lengths = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        for rows, prompt in parts:
            own = prompt.embeds.shape[1]
            whole = whole.index_copy(0, rows, nn.functional.pad(prompt.embeds, (0, 0, longest - own, 0)))
            lengths[rows] = own
        changes = Changes.joined(len(embeds), ((rows, prompt.changes) for rows, prompt in parts))
        return cls(whole, lengths, changes=changes)
