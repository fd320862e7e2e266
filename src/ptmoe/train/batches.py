"""Batches by a token budget instead of a number of rows, and a batch for each of several processes."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import BatchSampler, Dataset, Sampler

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.evaluation import batches_within
from ptmoe.fast.loss import IGNORED

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

    Raises:
        PtmoeError: a budget below the longest example.
    """

    def __init__(self, lengths: npt.ArrayLike, budget: int, *, padded: bool = False, seed: int = 0) -> None:
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

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, and when it resumes in the middle of one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch + 1]).permutation(len(self.batches))
        return (self.batches[index] for index in order)


class EvenBatches(BatchSampler):
    """As many batches for each process as for every other: those that are missing hold one blank (`WithBlanks`)."""

    def __init__(self, batches: Any, processes: int) -> None:
        self.batches, self.processes = batches, processes
        self.drop_last = False

    @property
    def sampler(self) -> Any:
        """`accelerate` replaces a random one by one that all processes seed alike."""
        return getattr(self.batches, "sampler", None)

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batches.sampler = sampler

    def __len__(self) -> int:
        return len(self.batches) + -len(self.batches) % self.processes

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.batches
        yield from [[~0]] * (-len(self.batches) % self.processes)


class Blank(dict[str, Any]):
    """An example that counts for nothing."""


class WithBlanks(Dataset[Any]):
    """A data set in which the index `~i`, which is negative, gives example `i` as a blank."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index] if index >= 0 else Blank(self.data[~index])


class Blanking:
    """A collator of batches with labels; a batch of a blank has no supervised token."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        if isinstance(examples[0], Blank):
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch
