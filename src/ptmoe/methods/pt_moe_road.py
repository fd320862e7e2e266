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

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.fast.passes import Changes
from ptmoe.methods.base import Batches, InitialEmbeddings, PreTrainedModel, Prompt, Size
from ptmoe.methods.by_row import RowChanges
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
    changes_rows = True
    num_virtual_tokens: Size = 8
    rank: Size = 8

    def default_names(self, base: PreTrainedModel) -> list[str]:
        return ["v_proj"] if modules_named(base, ["v_proj"]) else super().default_names(base)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> PTMoERoAd:
        return PTMoERoAd(self.replace(target_modules=self.target_names(base)), base)


class PTMoERoAd(PTMoE):
    """Tensors: PT-MoE's and `R (N, D)`; while training with `shared_factor`, `shared_R (D,)`, from which `R` holds the
    experts' differences."""

    config: PTMoERoAdConfig
    base: PreTrainedModel
    by_row: RowChanges
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
        vars(self)["base"] = base  # not a submodule: it would be saved with the adapter
        vars(self)["by_row"] = RowChanges.on(base, modules, rotated)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        assert prompt.routing is not None
        prompt.changes = Changes({self.by_row: prompt.routing.gate @ self.whole("R")})
        return prompt

    def mean_prompt(self, rows: int) -> tuple[Prompt, Tensor]:
        prompt, copies = super().mean_prompt(rows)
        prompt.changes = Changes({self.by_row: self.whole("R").detach().mean(0).expand(rows, -1)})
        return prompt, copies

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.R.zero_()
        super().initialise(source)

    def fixed_prompts(self) -> None:
        """None, because what is fixed is not all: the layers change with the input as well."""

    def remove(self) -> None:
        self.by_row.release(self.base)


def rotated(output: Tensor, change: Tensor) -> Tensor:
    """`(…, out)`, as complex numbers, times 1 and the change `(…, out)`."""
    (a, b), (real, imaginary) = change.chunk(2, -1), output.chunk(2, -1)
    return torch.cat((real + a * real - b * imaginary, imaginary + a * imaginary + b * real), -1)
