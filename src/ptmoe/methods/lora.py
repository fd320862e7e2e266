"""LoRA (Hu et al. 2021, arXiv:2106.09685), from `peft`: a low-rank change of some linear modules.

y = W x + (α / R) B A x            A: (R, in), B: (out, R)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ptmoe.methods.base import Size
from ptmoe.methods.injected import InjectedConfig
from ptmoe.methods.weights import TargetedConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class LowRankConfig(TargetedConfig):
    """What LoRA and its variants share.

    Attributes:
        rank: `R`.
        alpha: `α`; by default `2·R`, so that the usual factor of 2 is the same at every rank.
    """

    free_sizes: ClassVar[tuple[str, ...]] = ("rank",)
    rank: Size = 1
    alpha: Size | None = None

    @property
    def scaling(self) -> float:
        """The factor of the low-rank product, `α / R`."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoRAConfig(LowRankConfig, InjectedConfig):
    """LoRA: `R·(in + out)` trainable parameters for each target module."""

    method: ClassVar[str] = "lora"
    order: ClassVar[int] = 100
    paper_order: ClassVar[int | None] = 2
    figure_color: ClassVar[tuple[str, str] | None] = ("#5340b8", "#a79bf0")
    figure_marker: ClassVar[str | None] = "P"

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(**common)

    def lora_config(self, **fields: Any) -> PeftConfig:
        """`peft`'s config of LoRA, with the fields that a variant adds."""
        from peft import LoraConfig

        return LoraConfig(**({"r": self.rank, "lora_alpha": self.alpha or 2 * self.rank} | fields))


class LoRAVariantConfig(LoRAConfig):
    """A variant of LoRA, which is in no table of the paper."""

    paper_order: ClassVar[int | None] = None
    figure_color: ClassVar[tuple[str, str] | None] = None
    figure_marker: ClassVar[str | None] = None
