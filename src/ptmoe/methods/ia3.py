"""(IA)³ (Liu et al. 2022, arXiv:2205.05638), from `peft`: a trainable factor for each output of a module or, in the
feed-forward part, for each input.

y = l ⊙ (W x)        or        y = W (l ⊙ x)
"""

from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import PreTrainedModel
from ptmoe.methods.injected import InjectedConfig, PeftConfig
from ptmoe.methods.weights import linear_names


class IA3Config(InjectedConfig):
    """(IA)³: `out` (in the feed-forward part `in`) trainable parameters for each target module.

    Attributes:
        target_modules: by default `peft`'s for the architecture: in Llama's keys, values and the feed-forward part's
            second module.
        feedforward_modules: those of them whose input is scaled; by default `peft`'s.
    """

    method = "ia3"
    order = 200
    default_learning_rate = 1e-2
    feedforward_modules: list[str] | None = None

    def default_names(self, base: PreTrainedModel) -> list[str]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

        names: list[str] | None = DEFAULTS.get(base.config.model_type)
        if names is None:
            raise PtmoeError(
                f"peft has no default modules of {type(base).__name__} for ia3: name some of its own in target_modules "
                f"({linear_names(base)})"
            )
        return names

    def resolved(self, base: PreTrainedModel) -> tuple[InjectedConfig, dict[str, Any]]:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as DEFAULTS

        config, common = super().resolved(base)
        inner, names = self.feedforward_modules, common["target_modules"]
        if inner is None:
            inner = sorted(name for name in DEFAULTS.get(base.config.model_type, []) if name in names)
        if others := sorted(set(inner) - set(names)):
            raise PtmoeError(
                f"feedforward_modules names {', '.join(others)}, and target_modules {', '.join(names)}: it has to name "
                "some of these"
            )
        return config.replace(feedforward_modules=inner), common | {"feedforward_modules": inner}

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        from peft import IA3Config as PeftIA3Config

        return PeftIA3Config(**({"feedforward_modules": self.feedforward_modules} | common))
