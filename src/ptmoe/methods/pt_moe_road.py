"""PT-MoE with RoAd: PT-MoE (arXiv:2505.09519) whose router chooses for each input, beside a short prompt, rotations of
what some modules of every layer compute, as RoAd (Liao and Monz 2024, arXiv:2409.00119) trains them.

P, g as in PT-MoE                                                    (T, H), (N,)
r  = Σ_i g_i R_i                    R: (N, D), D the outputs of all target modules
y' = (1 + a + b√-1) ⊙ y             y: a module's output, as out/2 complex numbers; a and b: its part of r

A module's output `(out,)` is read as complex numbers, the first half their real parts; each is rotated and scaled by a
number of its own, which starts at 1. RoAd says the same with an angle and a length for each pair of outputs. Virtual
tokens are rotated as those of the input are.

This combination is this project's own (docs/findings.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.lock import base_lock
from ptmoe.fast.passes import CHANGES, recomputed_within
from ptmoe.methods.base import Batches, InitialEmbeddings, PreTrainedModel, Prompt, Size
from ptmoe.methods.pt_moe import PTMoE, PTMoEConfig
from ptmoe.methods.weights import TargetsConfig, features_of, modules_named


class PTMoERoAdConfig(TargetsConfig, PTMoEConfig):
    """PT-MoE with RoAd: PT-MoE's count plus `N·D`, `D` the outputs of all target modules together.

    Attributes:
        target_modules: as of other methods that change layers; by default `v_proj` alone.

    The others are those of `PTMoEConfig`; `shared_factor` holds for `R` as well.
    """

    method = "pt-moe-road"
    order = 11
    default_learning_rate = 0.03
    figure_color = ("#b35900", "#f0a35e")
    figure_marker = "h"
    changes_layers = True
    num_virtual_tokens: Size = 8
    rank: Size = 8

    def default_names(self, base: PreTrainedModel) -> list[str]:
        return ["v_proj"] if modules_named(base, ["v_proj"]) else super().default_names(base)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> PTMoERoAd:
        return PTMoERoAd(self.replace(target_modules=self.target_names(base)), base)


@dataclass
class Part:
    """A module's part of the changes of the pass that is running, `(B, out)`.

    The hooks of all layers hold one of these, and nothing else that differs: a compiler that found numbers there would
    compile each layer anew, and give up at the eighth.
    """

    change: Tensor | None = None


class PTMoERoAd(PTMoE):
    """Tensors: PT-MoE's and `R (N, D)`; while training with `shared_factor`, `shared_R (D,)`, from which `R` holds the
    experts' differences."""

    config: PTMoERoAdConfig
    shared_parts = PTMoE.shared_parts | {"R": "shared_R"}

    def __init__(self, config: PTMoERoAdConfig, base: PreTrainedModel) -> None:
        super().__init__(config, base.get_input_embeddings().weight.shape[1])
        modules = modules_named(base, config.target_modules or [])
        sizes = {name: features_of(module)[1] for name, module in modules.items()}
        if odd := [name for name, size in sizes.items() if size % 2]:
            raise PtmoeError(
                f"{config.method} rotates pairs of outputs, and {odd[0]} has {sizes[odd[0]]}: name other target_modules"
            )
        self.R = nn.Parameter(torch.empty(config.num_experts, sum(sizes.values())))
        self.register_parameter("shared_R", None)
        self.sizes = list(sizes.values())
        self.parts = [Part() for _ in sizes]
        self.changes: Tensor | None = None  # of the pass through the base that is running, (B, D)
        self.rows: Tensor | None = None  # (1, S), where the rows of a batch are packed: the row of each token
        self.throughout: Tensor | None = None  # the changes of passes that bring none
        self.running = ExitStack()
        self.hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ]
        for module, part in zip(modules.values(), self.parts, strict=True):
            self.hooks.append(module.register_forward_hook(partial(self._rotate, part)))

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        assert prompt.routing is not None
        prompt.changes = prompt.routing.gate @ self.whole("R")
        return prompt

    def mean_prompt(self, rows: int) -> tuple[Prompt, Tensor]:
        prompt, copies = super().mean_prompt(rows)
        prompt.changes = self.whole("R").detach().mean(0).expand(rows, -1)
        return prompt, copies

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.R.zero_()
        super().initialise(source)

    def fixed_prompts(self) -> None:
        """None, because what is fixed is not all: the layers change with the input as well."""

    def _begin(self, base: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """A pass through the base brings its rows' changes; one without is the base's own."""
        self.running.close()  # of a pass that was interrupted
        self._set(*options.pop(CHANGES, (self.throughout, None)))
        if self.changes is not None:
            again = partial(self._holding, base, self.changes, self.rows)
            self.running.enter_context(recomputed_within(base, again))
        return arguments, options

    def _end(self, *_: Any) -> None:
        self.running.close()
        self._set(None, None)

    def _set(self, changes: Tensor | None, rows: Tensor | None) -> None:
        self.changes, self.rows = changes, rows
        changes_of = [None] * len(self.parts) if changes is None else changes.split(self.sizes, 1)
        for part, change in zip(self.parts, changes_of, strict=True):
            part.change = change

    @contextmanager
    def _holding(self, base: nn.Module, changes: Tensor, rows: Tensor | None) -> Iterator[None]:
        """Within it layers that the backward pass computes again find what the forward pass had."""
        with base_lock(base):  # another thread's pass finds its own
            before = self.changes, self.rows
            self._set(changes, rows)
            try:
                yield
            finally:
                self._set(*before)

    @contextmanager
    def held(self, changes: Tensor, copies: int) -> Iterator[None]:
        self.throughout = changes.repeat_interleave(copies, 0)
        try:
            yield
        finally:
            self.throughout = None

    def _rotate(self, part: Part, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        change = part.change
        if change is None:
            return output
        change = change[:, None] if self.rows is None else change[self.rows]  # (B, 1, out) or (1, S, out)
        if output.dim() != 3 or len(change) != len(output) or change.shape[1] not in (1, output.shape[1]):
            raise PtmoeError(
                f"{type(module).__name__} computes {tuple(output.shape)} for a batch of {len(change)} rows, so "
                f"{self.config.method} cannot tell which are whose: name other target_modules"
            )
        change = change.to(output.device, torch.promote_types(output.dtype, change.dtype))
        (a, b), (real, imaginary) = (one.chunk(2, -1) for one in (change, output.to(change.dtype)))
        rotated = torch.cat((real + a * real - b * imaginary, imaginary + a * imaginary + b * real), -1)
        return rotated.to(output.dtype)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
