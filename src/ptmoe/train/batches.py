"""Batches by a token budget instead of a number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.evaluation import batches_within

POOL = 64  # size, in batches, of the random pools in which padded rows are sorted by length


class TokenBatches(Sampler[list[int]]):
    """As many examples in a batch as a budget of tokens holds; each epoch has the same batches in another order.

    Examples are drawn at random. Where the model computes padding, rows of similar length are batched together:
    examples are sorted within random pools, and a batch costs as much as if all its rows were as long as the longest.

    Args:
        lengths: tokens of each example, virtual ones included.
        budget: tokens of a batch.
        padded: whether the model computes padding.
        seed: decides every random choice.
        processes: how many processes share the batches; each gets the same number of them.

    Raises:
        PtmoeError: a budget below the longest example.
    """

    def __init__(
        self, lengths: npt.ArrayLike, budget: int, *, padded: bool = False, seed: int = 0, processes: int = 1
    ) -> None:
        sizes = np.asarray(lengths)
        longest = int(sizes.argmax())
        if sizes[longest] > budget:
            over = int((sizes > budget).sum())
            raise PtmoeError(
                f"tokens_per_batch={budget}: example {longest} has {sizes[longest]} tokens, virtual ones included"
                + (f", and {over - 1} more are too long" if over > 1 else "")
                + "; raise it, or lower max_length"
            )
        self.seed = seed
        self.epoch = 0
        order = np.random.default_rng([seed, 0]).permutation(len(sizes))
        if padded:
            pool = max(1, round(POOL * budget / sizes.mean()))
            parts = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([part[np.argsort(sizes[part], kind="stable")] for part in parts])
        self.batches = batches_within(order.tolist(), sizes[order].tolist(), budget, padded=padded)
        count = len(self.batches)
        self.batches += [self.batches[index % count] for index in range(-count % processes)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, and when it resumes in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch + 1]).permutation(len(self.batches))
        return (self.batches[index] for index in order)
