"""Methods that `peft` implements inside the base's modules; their folders are `peft`'s own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, PreTrainedModel, quantization_of
from ptmoe.methods.weights import SharedParameters, TargetedConfig, WeightEncoder, modules_named

if TYPE_CHECKING:
    from peft import PeftConfig as PeftConfig
    from peft import PeftModel as PeftModel
else:
    PeftConfig = PeftModel = Any  # importing peft takes seconds

ADAPTER = "default"  # its name within peft: a model holds one


@contextmanager
def peft_errors(what: str) -> Iterator[None]:
    """What `peft` raises, as a PtmoeError that says what it refuses."""
    try:
        yield
    except PtmoeError:
        raise
    except Exception as error:  # each of its methods raises its own
        raise PtmoeError(f"peft refuses {what}: {' '.join(str(error).split())}") from None


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask (B, L)` of a training batch, without its labels."""
    ids = batch["input_ids"]
    return {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}


def require_inputs(base: PreTrainedModel, names: list[str], batch: dict[str, Tensor]) -> None:
    """
    Raises:
        PtmoeError: a module of these names gets no input from a training batch, so nothing can start from it.
    """
    modules = modules_named(base, names)
    reached: set[str] = set()
    with ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(lambda *_, name=name: reached.add(name)))
        base(**{name: value.to(base.device) for name, value in model_inputs(batch).items()}, use_cache=False)
    if idle := [name for name in modules if name not in reached]:
        raise PtmoeError(
            f"{len(idle)} of the {len(modules)} modules named {', '.join(names)} in {type(base).__name__} get no input "
            f"from text ({idle[0]}), and a start from inputs needs some: name the others alone in target_modules, by "
            "more of their names"
        )


class Injected(WeightEncoder):
    """The modules that `peft` has put into the base. The trainable parameters are its own, in float32."""

    rewrites_weights: ClassVar[bool] = False  # the target modules' own, before training
    config: InjectedConfig
    peft_model: PeftModel

    def __init__(self, config: InjectedConfig, base: PreTrainedModel, peft_config: PeftConfig) -> None:
        super().__init__(config, base)
        from peft import get_peft_model

        if hasattr(base, "peft_config"):
            raise PtmoeError(f"{type(base).__name__} holds a peft adapter already: load the base again")
        self.children_before: list[tuple[nn.Module, str, nn.Module]] = [
            (parent, name, child) for parent in base.modules() for name, child in parent.named_children()
        ]
        self.modules_before: list[nn.Module] = []  # whose weights are replaced
        self.weights_before: list[Tensor] = []
        if self.rewrites_weights:
            self.modules_before = list(modules_named(base, config.target_modules or []).values())
            weights = [id(module.weight) for module in self.modules_before]
            if len(set(weights)) < len(weights):
                raise PtmoeError(
                    f"{config.method} replaces the weight of each module, and in {type(base).__name__} several of "
                    f"{', '.join(config.target_modules or [])} share one: take lora, or other target_modules"
                )
            self.weights_before = [module.weight.detach().clone() for module in self.modules_before]  # type: ignore[operator]
        what = f"{config.method} on {type(base).__name__}"
        with self.removed_on_failure(), peft_errors(what), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for those who call peft themselves
            vars(self)["peft_model"] = get_peft_model(base, peft_config)
        base.train(base.training)  # with what is new in it
        named = self.peft_model.named_parameters()  # what the modules share is beside the base
        trainable = {name.removeprefix("base_model.model."): one for name, one in named if one.requires_grad}
        for name in list(trainable):
            if config.frozen is not None and config.frozen in name:
                trainable.pop(name).requires_grad_(False)
        self.weights = SharedParameters(trainable)
        with self.removed_on_failure():
            self.check_in_memory(trainable.values())

    def tensors(self) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(self.peft_model, adapter_name=ADAPTER, save_embedding_layers=False))

    def peft_config(self) -> dict[str, Any]:
        live = self.peft_model.peft_config[ADAPTER]
        common = {name: getattr(live, name) for name in ("task_type", "target_modules", "fan_in_fan_out")}
        saved = self.config.saved_peft_config(**common | {"target_modules": sorted(common["target_modules"])})
        fields = saved.to_dict() | {"inference_mode": True, "base_model_name_or_path": live.base_model_name_or_path}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        trainable = [(parameter, parameter.requires_grad) for parameter in self.peft_model.parameters()]
        self._swap_weights()
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            self._swap_weights()
            for parameter, flag in trainable:  # peft has reset them
                parameter.requires_grad_(flag)

    def remove(self) -> None:
        for parent, name, child in self.children_before:
            if getattr(parent, name) is not child:
                setattr(parent, name, child)
        self._swap_weights()
        self.weights_before = []
        vars(self.base).pop("peft_config", None)

    @torch.no_grad()
    def _swap_weights(self) -> None:
        """Exchange the base's own weights and those that the method has replaced them with."""
        for index, before in enumerate(self.weights_before):
            weight = self.modules_before[index].weight
            assert isinstance(weight, Tensor)
            self.weights_before[index] = weight.data
            weight.data = before.to(weight.device)


class InjectedConfig(TargetedConfig):
    """A method of `peft`."""

    encoder_class: ClassVar[type[Injected]] = Injected
    frozen: ClassVar[str | None] = None  # part of the names of adapter weights that do not train

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        """`peft`'s config to start training from; `common` are the fields that all of its methods have."""
        raise NotImplementedError

    def saved_peft_config(self, **common: Any) -> PeftConfig:
        """`peft`'s config of the saved adapter."""
        return self.initial_peft_config(**common)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self.resolved(base)
        return self.encoder_class(config, base, self.initial_peft_config(**common))

    def saved_encoder_for(self, base: PreTrainedModel) -> Injected:
        self.check_quantization(quantization_of(base))
        config, common = self.resolved(base)
        return self.encoder_class(config, base, self.saved_peft_config(**common))

    def resolved(self, base: PreTrainedModel) -> tuple[InjectedConfig, dict[str, Any]]:
        """This config with the names of the base's modules, and the fields that all configs of `peft` share."""
        names = self.target_names(base)
        transposed = not all(isinstance(module, nn.Linear) for module in modules_named(base, names).values())
        config = self.replace(target_modules=names)
        return config, {"task_type": "CAUSAL_LM", "target_modules": names, "fan_in_fan_out": transposed}


class OwnOptimizer(Injected):
    """A method that consists in how the weights are optimised. Its config has `create_optimizer(peft_model, …)`."""

    config: Any
    has_optimizer = False

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        self.has_optimizer = True
        optimizer: torch.optim.Optimizer = self.config.create_optimizer(
            self.peft_model, lr=learning_rate, weight_decay=weight_decay
        )
        return optimizer

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Any:
        if self.training and torch.is_grad_enabled() and not self.has_optimizer:
            self.has_optimizer = True  # warn once
            warnings.warn(
                f"{self.config.method} is an optimizer: another trains it as LoRA. Use ptmoe.train.PromptTrainer, or "
                "give your trainer model.encoder.optimizer(learning_rate, weight_decay)",
                stacklevel=2,
            )
        return super().forward(input_embeds, input_mask)
