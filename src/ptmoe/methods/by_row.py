"""Changes of the base's layers that differ from row to row of a batch.

A pass through the base brings its rows' numbers, by the keyword `ptmoe.fast.passes.CHANGES` or an attribute of the base
of that name, and hooks on some of its modules apply them. A pass that brings none is the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.lock import base_lock
from ptmoe.fast.passes import CHANGES, NONE, recomputed_within
from ptmoe.methods.weights import features_of


@dataclass
class Part:
    """A module's part of the changes of the pass that is running, `(B, out)`.

    The hooks of all layers hold one of these, and nothing else that differs: a compiler that found numbers there would
    compile each layer anew, and give up at the eighth.
    """

    change: Tensor | None = None


class RowChanges:
    """Hooks on a base that change the outputs of some modules for each row by its own numbers, one for each output.

    Args:
        base: whose passes bring them.
        modules: linear ones of the base, by full name.
        apply: from an output `(B, S, out)` and its rows' numbers `(B or 1, 1 or S, out)`, both in float32 or wider, to
            the changed output.
    """

    def __init__(
        self, base: nn.Module, modules: dict[str, nn.Module], apply: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.sizes = [features_of(module)[1] for module in modules.values()]
        self.parts = [Part() for _ in self.sizes]
        self.apply = apply
        self.changes: Tensor | None = None  # of the pass that is running, (B, D)
        self.rows: Tensor | None = None  # (1, S), where the rows of a batch are packed: the row of each token
        self.running = ExitStack()
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ]
        for module, part in zip(modules.values(), self.parts, strict=True):
            self.hooks.append(module.register_forward_hook(partial(self._change, part)))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _begin(self, base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.running.close()  # of a pass that was interrupted
        self._set(*options.pop(CHANGES, vars(base).get(CHANGES, NONE)))
        if self.changes is not None:
            again = partial(self._again, base, self.changes, self.rows)
            self.running.enter_context(recomputed_within(base, again))
        return arguments, options

    def _end(self, *_: Any) -> None:
        self.running.close()
        self._set(*NONE)

    def _set(self, changes: Tensor | None, rows: Tensor | None) -> None:
        self.changes, self.rows = changes, rows
        changes_of = [None] * len(self.parts) if changes is None else changes.split(self.sizes, 1)
        for part, change in zip(self.parts, changes_of, strict=True):
            part.change = change

    @contextmanager
    def _again(self, base: nn.Module, changes: Tensor, rows: Tensor | None) -> Iterator[None]:
        """Within it layers that the backward pass computes again find what the forward pass had."""
        with base_lock(base):  # another thread's pass finds its own
            before = self.changes, self.rows
            self._set(changes, rows)
            try:
                yield
            finally:
                self._set(*before)

    def _change(self, part: Part, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        change = part.change
        if change is None:
            return output
        change = change[:, None] if self.rows is None else change[self.rows]  # (B, 1, out) or (1, S, out)
        if output.dim() != 3 or len(change) != len(output) or change.shape[1] not in (1, output.shape[1]):
            raise PtmoeError(
                f"{type(module).__name__} computes {tuple(output.shape)} for a batch of {len(change)} rows, so nothing "
                "tells which are whose, and each has changes of its own: name other target_modules"
            )
        change = change.to(output.device, torch.promote_types(output.dtype, change.dtype))
        return self.apply(output.to(change.dtype), change).to(output.dtype)
