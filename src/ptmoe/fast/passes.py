"""What one pass through a base brings along, and what layers find that its backward pass computes again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

from torch import nn

# The keyword of a pass for its rows' changes of the layers, `(B, D)`, and of packed rows each token's row, `(1, S)`.
CHANGES = "prompt_changes"
NONE = (None, None)

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
