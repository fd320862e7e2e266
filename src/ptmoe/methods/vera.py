"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454), from `peft`: two trainable vectors between frozen random matrices.

y = W x + λ_b ⊙ (B (λ_d ⊙ (A x)))        A: (R, in), B: (out, R), random, the same for all modules
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ptmoe.methods.base import Size
from ptmoe.methods.injected import InjectedConfig

if TYPE_CHECKING:
    from peft import PeftConfig


class VeRAConfig(InjectedConfig):
    """VeRA: `R + out` trainable parameters for each target module.

    Attributes:
        rank: `R`; far higher than LoRA's, because it costs little.
        projection_prng_key: the seed of the random matrices, which are saved as well.
    """

    method: ClassVar[str] = "vera"
    order: ClassVar[int] = 190
    free_sizes: ClassVar[tuple[str, ...]] = ("rank",)
    default_learning_rate: ClassVar[float] = 1e-2
    rank: Size = 256
    projection_prng_key: Annotated[int, Field(ge=0)] = 0

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(r=self.rank, projection_prng_key=self.projection_prng_key, **common)
