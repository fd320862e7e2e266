"""Batches in parts, where memory cannot hold one whole."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

Made = TypeVar("Made")


class Parts:
    """In how many parts a batch is computed: in twice as many whenever memory cannot hold one, also those that follow.

    Attributes:
        count: of the parts.
    """

    def __init__(self) -> None:
        self.count = 1

    def computed(
        self, inputs: dict[str, Any], compute: Callable[[dict[str, Any]], Made], undo: Callable[[], None] | None = None
    ) -> list[Made]:
        """What `compute` makes of each part of a batch.

        Args:
            inputs: the batch, `input_ids (B, L)` among them.
            compute: gets some of its rows.
            undo: called before the batch is started again.

        Raises:
            RuntimeError: memory cannot hold a single row.
        """
        rows = len(inputs["input_ids"])
        while True:
            size = -(-rows // min(self.count, rows))
            try:
                return [compute(_rows(inputs, slice(start, start + size))) for start in range(0, rows, size)]
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or size == 1:
                    raise
            # Outside the handler, which keeps the failed step's tensors alive.
            if undo is not None:
                undo()
            clear_device_cache(garbage_collection=True)
            self.count = 2 * -(-rows // size)
            warnings.warn(
                f"out of memory with {size} rows at once: batches are computed in {self.count} parts from here on, "
                "with the same gradients",
                stacklevel=2,
            )


def _rows(inputs: dict[str, Any], part: slice) -> dict[str, Any]:
    """Some rows of a batch."""
    count = len(inputs["input_ids"])
    return {
        name: value[part] if isinstance(value, Tensor | list | tuple) and len(value) == count else value
        for name, value in inputs.items()
    }
