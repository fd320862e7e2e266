"""(IA)³ (Liu et al. 2022, arXiv:2205.05638), from `peft`: a trained factor for each number that a module gives, or, in
the feed-forward part, takes.

y = l ⊙ (W x)        or        y = W (l ⊙ x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ptmoe.errors import PtmoeError
from ptmoe.methods.injected import InjectedConfig
from ptmoe.methods.weights import check_fit, linear_modules

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class IA3Config(InjectedConfig):
    """(IA)³.

    Attributes:
        target_modules: by default what `peft` takes for the architecture: keys, values and the feed-forward part's
            second module in Llama's.
        feedforward_modules: those of them whose input is scaled; by default as `peft` has it.
    """

    method: ClassVar[str] = "ia3"
    default_learning_rate: ClassVar[float] = 1e-2
    feedforward_modules: list[str] | None = None

    def fitted(self, base: PreTrainedModel) -> list[str]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as USUAL

        names = USUAL.get(base.config.model_type) if self.target_modules is None else self.target_modules
        if names is None:
            known = dict.fromkeys(whole.rpartition(".")[2] for whole in linear_modules(base))
            raise PtmoeError(
                f"peft knows no modules of {type(base).__name__} for ia3: name some of its own in target_modules "
                f"({', '.join(known)})"
            )
        check_fit(self.method, base, names)
        return sorted(names)

    def _fields(self, base: PreTrainedModel) -> tuple[InjectedConfig, dict[str, Any]]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as USUAL

        config, common = super()._fields(base)
        inner = self.feedforward_modules
        if inner is None:
            targets = common["target_modules"]
            inner = sorted(name for name in USUAL.get(base.config.model_type, []) if name in targets)
        return config.replace(feedforward_modules=inner), common | {"feedforward_modules": inner}

    def peft_form(self, **common: Any) -> PeftConfig:
        from peft import IA3Config as Form

        return Form(**({"feedforward_modules": self.feedforward_modules} | common))
