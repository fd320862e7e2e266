"""What one pass through a base brings along, and what layers find that its backward pass computes again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import nn

# The keyword of a pass for its rows' changes of the layers, `(B, D)`, and of packed rows each token's row, `(1, S)`.
CHANGES = "prompt_changes"


@contextmanager
def recomputed_within(base: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Layers of `base` whose forward pass runs in this are computed again, later, within a context of their own, and
    within those of others that are asked for at the same time."""
    recomputed = {
        module: cast(Any, module)._gradient_checkpointing_func
        for module in (base.modules() if cast(Any, base).is_activation_checkpointing else ())
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    }
    for module, function in recomputed.items():
        before = getattr(function, "contexts", ())
        contexts = (*before, context)
        cast(Any, module)._gradient_checkpointing_func = partial(
            function, use_reentrant=False, context_fn=partial(_both, contexts)
        )
        cast(Any, module)._gradient_checkpointing_func.contexts = contexts
    try:
        yield
    finally:
        for module, function in recomputed.items():
            cast(Any, module)._gradient_checkpointing_func = function


def _both(contexts: tuple[Callable[[], AbstractContextManager[Any]], ...]) -> tuple[Any, Any]:
    """What `torch.utils.checkpoint` enters in the forward pass, and when it computes again."""
    return nullcontext(), _entered(contexts)


@contextmanager
def _entered(contexts: tuple[Callable[[], AbstractContextManager[Any]], ...]) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context())
        yield
