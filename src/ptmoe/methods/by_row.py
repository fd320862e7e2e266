"""Changes of the base's layers that differ from row to row of a batch, so that its rows may be of several adapters.

A pass through the base brings its rows' numbers, by the keyword `ptmoe.fast.passes.CHANGES` or an attribute of the base
of that name, and hooks on some of its modules apply them. A pass that brings none is the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.lock import base_lock
from ptmoe.fast.passes import CHANGES, Changes, recomputed_within
from ptmoe.methods.weights import features_of

ON_BASE = "ptmoe_row_changes"  # an attribute of a base
COUNTING = Lock()  # never held while waiting for another

Apply = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Part:
    """A module's part of the changes of the pass that is running, `(B, out)`.

    The hooks of all layers hold one of these, and nothing else that differs: a compiler that found numbers there would
    compile each layer anew, and give up at the eighth.
    """

    change: Tensor | None = None


class RowChanges:
    """Hooks on a base that change the outputs of some modules for each row by its own numbers, one for each output.

    All adapters that change the same modules of a base in the same way share one of these (`on`). The hooks are there
    while somebody holds them.

    Args:
        modules: linear ones of the base, by full name.
        apply: from an output `(B, S, out)` and its rows' numbers `(B or 1, 1 or S, out)`, both in float32 or wider, to
            the changed output.
    """

    def __init__(self, modules: dict[str, nn.Module], apply: Apply) -> None:
        self.modules, self.apply = modules, apply
        self.sizes = [features_of(module)[1] for module in modules.values()]
        self.parts = [Part() for _ in self.sizes]
        self.changes: Changes | None = None  # of the pass that is running
        self.running = ExitStack()
        self.hooks: list[Any] = []
        self.holders = 0

    @classmethod
    def on(cls, base: nn.Module, modules: dict[str, nn.Module], apply: Apply) -> RowChanges:
        """Those of a base, held."""
        of_base = vars(base).setdefault(ON_BASE, {})
        # By the modules, not their names alone: another may stand where one was.
        found = cast(RowChanges, of_base.setdefault((apply, *modules.items()), cls(modules, apply)))
        found.hold(base)
        return found

    def hold(self, base: nn.Module) -> None:
        if not self._held_by(1, others=1):  # else a server's next adapter would wait for the rows of the others
            with base_lock(base):  # a pass that is running goes through the hooks
                self._held_by(1)
                if not self.hooks:
                    self.hooks = [
                        base.register_forward_pre_hook(self._begin, with_kwargs=True),
                        base.register_forward_hook(self._end, always_call=True),
                    ]
                    for module, part in zip(self.modules.values(), self.parts, strict=True):
                        self.hooks.append(module.register_forward_hook(partial(self._change, part)))

    def release(self, base: nn.Module) -> None:
        if not self._held_by(-1, others=2):
            with base_lock(base):
                self._held_by(-1)
                if not self.holders:
                    for hook in self.hooks:
                        hook.remove()
                    self.hooks.clear()

    def _held_by(self, more: int, others: int = 0) -> bool:
        """Count, where so many hold it."""
        with COUNTING:
            counted = self.holders >= others
            self.holders += more * counted
        return counted

    def _begin(self, base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.running.close()  # of a pass that was interrupted
        given = options.get(CHANGES, vars(base).get(CHANGES))
        self._set(given)
        if given is not None and self in given.numbers:
            options.pop(CHANGES, None)
            if others := {of: numbers for of, numbers in given.numbers.items() if of is not self}:
                options[CHANGES] = replace(given, numbers=others)  # for their own hooks
            self.running.enter_context(recomputed_within(base, partial(self._again, given)))
        return arguments, options

    def _end(self, *_: Any) -> None:
        self.running.close()
        self._set(None)

    def _set(self, changes: Changes | None) -> None:
        self.changes = changes
        numbers = None if changes is None else changes.numbers.get(self)
        changes_of = [None] * len(self.parts) if numbers is None else numbers.split(self.sizes, 1)
        for part, change in zip(self.parts, changes_of, strict=True):
            part.change = change

    @contextmanager
    def _again(self, changes: Changes) -> Iterator[None]:
        """Within it layers that the backward pass computes again find what the forward pass had."""
        before = self.changes
        self._set(changes)
        try:
            yield
        finally:
            self._set(before)

    def _change(self, part: Part, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        change = part.change
        if change is None:
            return output
        rows = cast(Changes, self.changes).rows
        change = change[:, None] if rows is None else change[rows]  # (B, 1, out) or (1, S, out)
        if output.dim() != 3 or len(change) != len(output) or change.shape[1] not in (1, output.shape[1]):
            raise PtmoeError(
                f"{type(module).__name__} computes {tuple(output.shape)} for a batch of {len(change)} rows, so nothing "
                "tells which are whose, and each has changes of its own: name other target_modules"
            )
        change = change.to(output.device, torch.promote_types(output.dtype, change.dtype))
        return self.apply(output.to(change.dtype), change).to(output.dtype)
