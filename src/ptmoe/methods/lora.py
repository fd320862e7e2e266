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
    """What LoRA and its kin share.

    Attributes:
        rank: `R`.
        alpha: `α`; by default `2·R`, so that the usual factor of 2 stays when the rank changes.
    """

    rank: Size = 1
    alpha: Size | None = None

    @property
    def scaling(self) -> float:
        """By which the product of the factors is multiplied."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoRAConfig(LowRankConfig, InjectedConfig):
    """LoRA: `R·(in + out)` trained numbers for each target module."""

    method: ClassVar[str] = "lora"

    def peft_form(self, **common: Any) -> PeftConfig:
        return self.lora(**common)

    def lora(self, **fields: Any) -> PeftConfig:
        """`peft`'s config, with the fields that a variant adds."""
        from peft import LoraConfig

        alpha = self.alpha or 2 * self.rank
        return LoraConfig(**({"r": self.rank, "lora_alpha": alpha} | fields))
