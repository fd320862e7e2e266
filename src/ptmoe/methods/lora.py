"""LoRA (Hu et al. 2021, arXiv:2106.09685), from `peft`: a low-rank change of some linear modules.

y = W x + (α / R) B A x            A: (R, in), B: (out, R)
"""

from typing import Any, ClassVar

from ptmoe.methods.base import Size
from ptmoe.methods.injected import InjectedConfig, PeftConfig
from ptmoe.methods.weights import TargetedConfig


class LowRankConfig(TargetedConfig):
    """What LoRA and its variants share.

    Attributes:
        rank: `R`.
        alpha: `α`; by default `2·R`, so that the usual factor of 2 is the same at every rank.
    """

    free_sizes = ("rank",)
    default_learning_rate = 6e-3
    rated_width: ClassVar[int | None] = 576  # that this rate was searched at; None where one rate suits every width
    rank: Size = 1
    alpha: Size | None = None

    @classmethod
    def learning_rate_on(cls, base_config: Any) -> float:
        """Falls with the root of the width, as the largest stable one does where A starts random and B at zero (Hayou
        et al. 2024, arXiv:2406.08447): on nano the result is the best that was tried for most of this family."""
        usual = super().learning_rate_on(base_config)
        if cls.rated_width is None:
            return usual
        width = getattr(base_config.get_text_config(), "hidden_size", cls.rated_width)
        return float(f"{usual * (cls.rated_width / width) ** 0.5:.2g}")

    @property
    def scaling(self) -> float:
        """The factor of the low-rank product, `α / R`."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoRAFamilyConfig(LowRankConfig, InjectedConfig):
    """LoRA or one of the variants that `peft` has: its fields, and `peft`'s config of it."""

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        return self.lora_config(**common)

    def lora_config(self, **fields: Any) -> PeftConfig:
        """`peft`'s config of LoRA, with the fields that a variant adds."""
        from peft import LoraConfig

        return LoraConfig(**({"r": self.rank, "lora_alpha": self.alpha or 2 * self.rank} | fields))


class LoRAConfig(LoRAFamilyConfig):
    """LoRA: `R·(in + out)` trainable parameters for each target module."""

    method = "lora"
    order = 100
    figure_color = ("#5340b8", "#a79bf0")
    figure_marker = "P"
