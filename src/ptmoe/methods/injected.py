"""Methods whose parts `peft` puts into the base: it has the mathematics, and its folders are read by it alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, quantization_of
from ptmoe.methods.weights import Shared, TargetedConfig, WeightEncoder, named

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # its name within peft: a model holds one


class InjectedConfig(TargetedConfig):
    """A method of `peft`."""

    frozen: ClassVar[str | None] = None  # in the names of adapter weights that do not train

    def peft_form(self, **common: Any) -> PeftConfig:
        """`peft`'s config to start from; `common` are the fields that all of its methods have."""
        raise NotImplementedError

    def saved_form(self, **common: Any) -> PeftConfig:
        """`peft`'s config of what is saved."""
        return self.peft_form(**common)

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self._fields(base)
        return self.encoder(config, base, self.peft_form(**common))

    def on_saved(self, base: PreTrainedModel) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self._fields(base)
        return self.encoder(config, base, self.saved_form(**common))

    @property
    def encoder(self) -> type[Injected]:
        return Injected

    def _fields(self, base: PreTrainedModel) -> tuple[InjectedConfig, dict[str, Any]]:
        targets = self.fitted(base)
        transposed = not all(isinstance(module, nn.Linear) for module in named(base, targets).values())
        config = self.replace(target_modules=targets)
        return config, {"task_type": "CAUSAL_LM", "target_modules": targets, "fan_in_fan_out": transposed}


class Injected(WeightEncoder):
    """What `peft` has put into the base. The trained parameters are its own, in float32."""

    changes_base: ClassVar[bool] = False  # rewrites the target modules' weights before it trains
    config: InjectedConfig
    peft_model: PeftModel

    def __init__(self, config: InjectedConfig, base: PreTrainedModel, form: PeftConfig) -> None:
        super().__init__(config, base)
        from peft import get_peft_model

        if hasattr(base, "peft_config"):
            raise PtmoeError(f"{type(base).__name__} holds a peft adapter already: load the base again")
        modules = named(base, config.target_modules or [])
        self.layers = [(base.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in modules]
        self.modules_before = list(modules.values())
        self.weights_before = (
            [module.weight.detach().clone() for module in self.modules_before]  # type: ignore[operator]
            if self.changes_base
            else []
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice for those who call peft themselves
                vars(self)["peft_model"] = get_peft_model(base, form)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            self.remove()
            raise PtmoeError(
                f"peft refuses {config.method} on {type(base).__name__}: {' '.join(str(error).split())}"
            ) from None
        trained = {name: one for name, one in base.named_parameters() if one.requires_grad}
        for name in list(trained):
            if config.frozen is not None and config.frozen in name:
                trained.pop(name).requires_grad_(False)
        self.weights = Shared(trained)

    def tensors(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.peft_model, adapter_name=ADAPTER, save_embedding_layers=False))

    def peft_config(self) -> dict[str, Any]:
        live = self.peft_model.peft_config[ADAPTER]
        common = {name: getattr(live, name) for name in ("task_type", "target_modules", "fan_in_fan_out")}
        form = self.config.saved_form(**common | {"target_modules": sorted(common["target_modules"])})
        written = form.to_dict() | {"inference_mode": True, "base_model_name_or_path": live.base_model_name_or_path}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in written.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        trains = [(parameter, parameter.requires_grad) for parameter in self.base.parameters()]
        self._exchange_weights()
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            self._exchange_weights()
            for parameter, flag in trains:  # peft sets them anew
                parameter.requires_grad_(flag)

    def remove(self) -> None:
        for (parent, name), module in zip(self.layers, self.modules_before, strict=True):
            setattr(parent, name, module)
        self._exchange_weights()
        self.weights_before = []
        vars(self.base).pop("peft_config", None)

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Between the base's own and those that the method has put in their place."""
        for index, before in enumerate(self.weights_before):
            weight = self.modules_before[index].weight
            assert isinstance(weight, Tensor)
            self.weights_before[index] = weight.data
            weight.data = before.to(weight.device)


class OwnOptimizer(Injected):
    """A method that is an optimizer of LoRA's weights."""

    made = False

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Any:
        if self.training and torch.is_grad_enabled() and not self.made:
            self.made = True  # say it once
            warnings.warn(
                f"{self.config.method} is an optimizer: another trains it as LoRA. Use ptmoe.train.PromptTrainer, or "
                "give your trainer model.encoder.optimizer(learning_rate, weight_decay)",
                stacklevel=2,
            )
        return super().forward(input_embeds, input_mask)
