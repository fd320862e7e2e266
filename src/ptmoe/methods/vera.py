"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454), from `peft`: two trainable vectors between frozen random matrices.

y = W x + λ_b ⊙ (B (λ_d ⊙ (A x)))        A: (R, in), B: (out, R), random, the same for all modules
"""

from typing import Annotated, Any

from pydantic import Field

from ptmoe.methods.base import Size
from ptmoe.methods.injected import InjectedConfig, PeftConfig


class VeRAConfig(InjectedConfig):
    """VeRA: `R + out` trainable parameters for each target module.

    Attributes:
        rank: `R`; far higher than LoRA's, because it costs little.
        projection_prng_key: the seed of the random matrices, which are saved as well.
    """

    method = "vera"
    order = 190
    free_sizes = ("rank",)
    default_learning_rate = 0.1
    rank: Size = 256
    projection_prng_key: Annotated[int, Field(ge=0)] = 0

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(r=self.rank, projection_prng_key=self.projection_prng_key, **common)
