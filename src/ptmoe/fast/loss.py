"""Cross-entropy over the supervised positions only.

With a vocabulary of 128k the projection to it takes most of a training step's memory and time, so it is computed at
supervised positions only, and in chunks where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32: 261 positions of a vocabulary of 128k


def supervised_positions(labels: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and targets, `(S,)` each, of the labels that are not -100 and on a real token."""
    rows, columns = ((labels != IGNORED) & attention_mask.bool()).nonzero(as_tuple=True)
    return rows, columns, labels[rows, columns]


def cross_entropy(logits: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Mean over the supervised tokens of the *global* batch where their number is given, else of this batch.

    Args:
        logits: `(S, V)`, upcast to float32.
        targets: `(S,)`.
        num_items: the count that `transformers.Trainer` passes as `num_items_in_batch`, over accumulation steps and
            processes, so that splitting a batch changes nothing.
    """
    return F.cross_entropy(logits.float(), targets, reduction="sum") / _count(targets, num_items)


def _count(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    count = max(len(targets), 1) if num_items is None else num_items
    return count.to(targets.device) if isinstance(count, Tensor) else count


@contextmanager
def projected_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within it, `head` projects `hidden[rows, columns]` alone: its output is `(1, S, V)`.

    What a model does to its logits after the projection (a scale, a soft cap) is element by element, so it still
    happens, whatever the architecture.
    """

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, columns][None],)

    with head.register_forward_pre_hook(select):
        yield


def cross_entropy_in_parts(
    hidden: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None,
    project: Callable[[Tensor], Tensor],
    size: int,
    statistics: TokenStatistics | None = None,
) -> Tensor:
    """`cross_entropy(project(hidden), …)`, of `hidden (S, H)`, with the logits `(size, V)` of at most `size` positions
    in memory; `statistics` receives each chunk.

    The gradient is computed together with the loss, chunk by chunk, so no logits are kept or computed twice. `project`
    is frozen: it gets no gradient.
    """
    total: Tensor = _InParts.apply(hidden, targets, project, size, statistics)
    return total / _count(targets, num_items)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        project: Callable[[Tensor], Tensor],
        size: int,
        statistics: TokenStatistics | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = []
        for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = part.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = project(leaf)
                loss = F.cross_entropy(logits.float(), wanted, reduction="sum")
            total += loss.detach()
            if statistics is not None:
                statistics.add(logits.detach(), wanted)
            if ctx.needs_input_grad[0]:
                gradients.append(torch.autograd.grad(loss, leaf)[0])
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (computed,) = ctx.saved_tensors
        return computed * gradient.to(computed.dtype), None, None, None, None


class TokenStatistics:
    """The statistics of supervised tokens that `trl` logs, summed over chunks.

    Attributes:
        entropy: sum of the entropies of the predictions, in nats.
        correct: number of supervised tokens that were the most probable.
        count: number of supervised tokens.
    """

    ROWS = 256  # logits rows at a time, for the entropy

    def __init__(self) -> None:
        self.entropy: Tensor | float = 0.0
        self.correct: Tensor | int = 0
        self.count = 0

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits `(S, V)` and the tokens `targets (S,)` that they were to predict."""
        for part in torch.split(logits, self.ROWS):
            self.entropy = self.entropy + torch.special.entr(part.float().softmax(1)).sum()
        self.correct = self.correct + (logits.argmax(1) == targets).sum()
        self.count += len(targets)
