"""What one pass through a base brings along, and what layers find that its backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

CHANGES = "prompt_changes"  # the keyword of a pass for its rows' `Changes`, or an attribute of the base

Rows = Tensor | slice


@dataclass(frozen=True, eq=False)
class Changes:
    """How the base's layers compute each row of a batch.

    Attributes:
        numbers: `(B, D)` for those whose hooks apply them (`ptmoe.methods.by_row.RowChanges`), zeros for a row that
            those leave as it is.
        rows: `(1, S)`, where the rows of the batch are packed: the row of each token.
    """

    numbers: dict[Any, Tensor]
    rows: Tensor | None = None

    def __getitem__(self, index: Rows) -> Changes:
        """Those of some rows, which may repeat."""
        return replace(self, numbers={of: numbers[index] for of, numbers in self.numbers.items()})

    def repeated(self, copies: int) -> Changes:
        """Each row's, `copies` times."""
        repeated = {of: numbers.repeat_interleave(copies, 0) for of, numbers in self.numbers.items()}
        return replace(self, numbers=repeated)

    def packed(self, rows: Tensor) -> Changes:
        return replace(self, rows=rows)

    @staticmethod
    def joined(count: int, parts: Iterable[tuple[Rows, Changes | None]]) -> Changes | None:
        """Those of a batch of `count` rows, from those of some of its rows; None for none."""
        whole: dict[Any, Tensor] = {}
        for index, part in parts:
            for of, numbers in part.numbers.items() if part is not None else ():
                if of not in whole:
                    whole[of] = numbers.new_zeros(count, numbers.shape[1])
                whole[of][index] = numbers
        return Changes(whole) if whole else None


Contexts = tuple[Callable[[], AbstractContextManager[Any]], ...]


@contextmanager
def recomputed_within(base: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Layers of `base` whose forward pass runs in this are computed again, later, within a context of their own, and
    within those of others that are asked for at the same time. They may end in any order."""
    recomputed = [
        cast(Any, module)
        for module in (base.modules() if cast(Any, base).is_activation_checkpointing else ())
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    for module in recomputed:
        function = module._gradient_checkpointing_func
        if not isinstance(function, _Checkpointing):
            module._gradient_checkpointing_func = function = _Checkpointing(function)
        function.contexts += (context,)
    try:
        yield
    finally:
        for module in recomputed:
            function = module._gradient_checkpointing_func
            if isinstance(function, _Checkpointing):  # else checkpointing was turned on anew
                function.contexts = tuple(other for other in function.contexts if other is not context)
                if not function.contexts:
                    module._gradient_checkpointing_func = function.own


class _Checkpointing:
    """A layer's `own` function that checkpoints it, within contexts."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.contexts: Contexts = ()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        contexts = partial(_contexts, self.contexts)  # those of now
        return self.own(*arguments, use_reentrant=False, context_fn=contexts, **options)


def _contexts(again: Contexts) -> tuple[Any, Any]:
    """What `torch.utils.checkpoint` enters in the forward pass, and when it computes again."""
    return nullcontext(), _entered(again)


@contextmanager
def _entered(contexts: Contexts) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context())
        yield
