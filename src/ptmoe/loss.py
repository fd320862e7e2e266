"""Cross-entropy over the supervised positions only.

At a vocabulary of 128k the projection to it is most of a training step's memory and time, so it is computed where a
label asks for it and nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


def supervised_positions(labels: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and targets, `(S,)` each, of the labels that count: not -100, on a real token."""
    rows, columns = ((labels != IGNORED) & attention_mask.bool()).nonzero(as_tuple=True)
    return rows, columns, labels[rows, columns]


def cross_entropy(logits: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Mean over supervised tokens: those of the *global* batch where their number is given, else of this one.

    Args:
        logits: `(S, V)`, upcast to float32.
        targets: `(S,)`.
        num_items: the count that `transformers.Trainer` passes as `num_items_in_batch`, over accumulation steps and
            processes, so that splitting a batch changes nothing.
    """
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    count = max(len(targets), 1) if num_items is None else num_items
    if isinstance(count, Tensor):
        count = count.to(total.device)
    return total / count


@contextmanager
def projected_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within it, `head` projects `hidden[rows, columns]` alone: its output is `(1, S, V)`.

    What a model does to its logits after the projection (a scale, a soft cap) is element by element, so it still
    happens, whatever the architecture.
    """

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows, columns][None],)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
