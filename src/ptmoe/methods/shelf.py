"""All methods of `peft` by its own names: `peft:TYPE`, with the fields of the type's own config, and short forms.

What is true of a type is read from `peft`'s classes of it, so a type that a later `peft` adds is there as well. The
adapter folder is plain `peft`'s, with our config beside its own.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.errors import PtmoeError, near
from ptmoe.methods.base import QUANTIZATIONS, PreTrainedModel, Size
from ptmoe.methods.injected import ADAPTER, Injected, InjectedConfig, PeftConfig, peft_errors
from ptmoe.methods.weights import linear_names
from ptmoe.settings import OF_PEFT, method_name


class Short(NamedTuple):
    """A type under a name of its own, with defaults for small adapters."""

    type: str
    learning_rate: float
    paper: str
    defaults: dict[str, Any] = {}


SHORT = {
    "ln-tuning": Short("LN_TUNING", 1e-2, "LN tuning (Zhao et al. 2023, arXiv:2312.11420)"),
    "fourierft": Short("FOURIERFT", 0.1, "FourierFT (Gao et al. 2024, arXiv:2405.03003)"),
    "vblora": Short("VBLORA", 3e-2, "VB-LoRA (Li et al. 2024, arXiv:2405.15179)", {"vector_length": 64}),
    "shira": Short("SHIRA", 1e-1, "SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175)", {"r": 1}),
    "c3a": Short("C3A", 1e-2, "C3A (Chen et al. 2024, arXiv:2407.19342)", {"block_size": 64}),
    "road": Short("ROAD", 0.1, "RoAd (Liao and Monz 2024, arXiv:2409.00119)"),
    "randlora": Short("RANDLORA", 1e-2, "RandLoRA (Albert et al. 2025, arXiv:2502.00987)"),
    "osf": Short("OSF", 1e-2, "Sculpting Subspaces (Nayak et al. 2025, arXiv:2504.07097)", {"effective_rank": 0.99}),
    "beft": Short("BEFT", 1e-2, "BEFT (2025, arXiv:2509.15974)"),
    "pvera": Short("PVERA", 0.1, "PVeRA (2025, arXiv:2512.07703)"),
    "tinylora": Short("TINYLORA", 1e-2, "TinyLoRA (2026, arXiv:2602.04118)"),
}
FREE = {"ADAPTION_PROMPT": "adapter_len", "FOURIERFT": "n_frequency", "WAVEFT": "n_frequency", "TINYLORA": "u",
    "UNILORA": "theta_d_length", "VBLORA": "num_vectors", "C3A": None, "RANDLORA": None,
    "GRALORA": None}  # what a budget sets, where it is not `r`; None where more is fewer, or 1 is no size  # fmt: skip
ON_VALUES = {"ADAMSS", "BOFT", "FROD", "SHIRA", "UNILORA"}  # built from numbers that the meta device does not have
ON_QUANTIZED = set(  # they compute with the weights that quantized ones stand for; the others read the packed numbers
    "ADAPTION_PROMPT BEFT BOFT FOURIERFT HIRA IA3 LN_TUNING LORA MISS OFT PVERA RANDLORA ROAD SHIRA VBLORA VERA "
    "WAVEFT".split()
)
OURS = {"PREFIX_TUNING": "prefix-tuning", "CARTRIDGE": "prefix-tuning", "P_TUNING": "p-tuning",
    "MULTITASK_PROMPT_TUNING": "multitask-prompt-tuning"}  # fmt: skip
UNFIT = {"LILY": "its router averages over all rows of a batch and their padding, so a row would depend on the others"}
WITHHELD = {  # fields with which a type would do more than train an adapter of its own
    field: reason
    for reason, names in {
        "the base's own weights do not train": "bias modules_to_save trainable_token_indices",
        "it may rewrite the base's weights: take pissa, eva, corda or lora": "init_lora_weights",
        "the base stays as it is": "layer_replication target_parameters megatron_config megatron_core",
        "it works in peft's own training loop alone": "alora_invocation_tokens use_asa",
        "it follows from the base": "use_qalora qalora_group_size ensure_weight_tying fan_in_fan_out inference_mode",
    }.items()
    for field in names.split()
}


class Shelf(Injected):
    """The modules of any type. What the folder holds is what `peft` says, which may be more than what trains."""

    def __init__(self, config: ShelfConfig, base: PreTrainedModel, peft_config: PeftConfig) -> None:
        own, ends = list(base.parameters()), (base.get_input_embeddings(), base.get_output_embeddings())
        before = [(one.data_ptr(), one._version) for one in own]
        super().__init__(config, base, peft_config)
        live = self.peft_model.peft_config[ADAPTER]
        with self.removed_on_failure():
            if [(one.data_ptr(), one._version) for one in own] != before:
                raise PtmoeError(
                    f"{config.method} has rewritten the base's own weights, and they cannot be restored: load the base "
                    "again, and take other fields or another method"
                )
            if any(one in ends and getattr(parent, name) is not one for parent, name, one in self.children_before):
                raise PtmoeError(
                    f"{config.method} changes the base's embedding, from which prompts and losses are computed here: "
                    "take other target_modules or another method"
                )
            with peft_errors(f"to load this {config.method} again"):
                type(live)(**self.peft_config())
            for parameter in self.weights.parameters():
                if parameter.dtype.itemsize < 4:
                    self._widen(parameter)
        if isinstance(live.target_modules, (set, list)):
            self.config = config.replace(target_modules=sorted(live.target_modules))

    def _widen(self, parameter: nn.Parameter) -> None:
        """Hold a number that `peft` trains in half precision, where small steps are lost, in float32.

        Raises:
            PtmoeError: its module does more than its own product, which the base's dtype must pass through.
        """
        owner = next(one for one in self.base.modules() if any(parameter is own for own in one._parameters.values()))
        if list(owner.children()):
            raise PtmoeError(f"{self.config.method} would train in {parameter.dtype}: load the base in float32")
        parameter.data = parameter.data.float()
        owner.register_forward_pre_hook(lambda _, inputs: tuple(one.float() for one in inputs))
        owner.register_forward_hook(lambda _, inputs, output: output.to(self.base.dtype))

    def peft_config(self) -> dict[str, Any]:
        fields = self.peft_model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in super().tensors().items()}  # several modules may share one

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        with peft_errors(f"these tensors of {self.config.method}"):
            set_peft_model_state_dict(self.peft_model, tensors, adapter_name=ADAPTER)


class ShelfConfig(InjectedConfig):
    """A type of `peft`. The other fields are those of its own config.

    Attributes:
        target_modules: the last part of the names of the modules that it changes; by default `peft`'s own for the type
            and the architecture. A saved adapter names them.
    """

    encoder_class = Shelf
    default_learning_rate = 1e-2
    peft_class: ClassVar[Any]
    tuner: ClassVar[Any]

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, values: dict[str, Any]) -> dict[str, Any]:
        known = {field.name for field in dataclasses.fields(cls.peft_class)}
        for name in values:
            if name in known and name not in cls.model_fields:
                reason = WITHHELD.get(name, "it is not a plain value")
                raise ValueError(f"{name} of peft's {cls.peft_class.__name__} is not offered ({reason}): leave it out")
        return values

    @model_validator(mode="after")
    def _as_peft_has_it(self) -> Self:
        with peft_errors("these settings"):
            self.initial_peft_config()
        return self

    def __reduce__(self) -> Any:
        """No module holds its class, by which it would be pickled."""
        return _remade, (self.method, self.model_dump())

    def initial_peft_config(self, **common: Any) -> PeftConfig:
        known = {field.name for field in dataclasses.fields(self.peft_class)}
        fields = self.model_dump() | common
        return self.peft_class(**{name: value for name, value in fields.items() if name in known})

    def resolved(self, base: PreTrainedModel) -> tuple[InjectedConfig, dict[str, Any]]:
        from transformers.pytorch_utils import Conv1D

        names, mapping = self.target_modules, getattr(self.tuner, "target_module_mapping", {})
        if names is None and mapping and base.config.model_type not in mapping:
            if mapping.get("llama") == ["q_proj", "v_proj"]:
                names = self.default_names(base)
            elif "_prepare_adapter_config" not in vars(self.tuner):
                raise PtmoeError(
                    f"peft has no default modules of {type(base).__name__} for {self.method}: name some of its own in "
                    f"target_modules (linear ones: {linear_names(base)})"
                )
        modules = [f".{full}" for full, _ in base.named_modules()]
        for name in names or ():
            if not any(full.endswith(f".{name}") for full in modules):
                raise PtmoeError(
                    f"{self.method} does not fit {type(base).__name__}, which has no module {name!r}: name some of its "
                    f"own in target_modules (linear ones: {linear_names(base)})"
                )
        transposed = any(isinstance(module, Conv1D) for module in base.modules())
        return self, {"task_type": "CAUSAL_LM", "target_modules": names, "fan_in_fan_out": transposed}


def peft_types() -> dict[str, Any]:
    """The installed `peft`'s config class of each of its types."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {getattr(kind, "value", str(kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def obstacle(kind: str) -> str | None:
    """Why a type of `peft` is not a method here, from its classes; None where it is one."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if issubclass(peft_types()[kind], PromptLearningConfig):
        return f"virtual tokens are put in place here, not by peft: take {OURS.get(kind, 'pt')}"
    if issubclass(tuner, BaseTuner) and tuner.forward is not BaseTuner.forward:
        return "part of it is in peft's own forward pass around the base, which is not taken here"
    return UNFIT.get(kind)


def shelf_method(name: str) -> type[ShelfConfig]:
    """The config of a short form, or of `peft:TYPE`, by its name as a method."""
    if name in SHORT:
        return shelf_config(SHORT[name].type, name)
    return shelf_config(name.removeprefix(OF_PEFT).replace("-", "_").upper())


def _remade(name: str, values: dict[str, Any]) -> ShelfConfig:
    return shelf_method(name)(**values)


@cache
def shelf_config(kind: str, short: str | None = None) -> type[ShelfConfig]:
    """The config of a type, by its name in `peft`, or of a short form.

    Raises:
        PtmoeError: the installed `peft` has no such type, or it is not a method here.
    """
    from peft import PeftConfig as Common
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    kinds = peft_types()
    name = method_name(OF_PEFT + kind)
    if kind not in kinds:
        raise PtmoeError(f"peft has no method {name!r}{near(name, [method_name(OF_PEFT + one) for one in kinds])}")
    if (reason := obstacle(kind)) is not None:
        raise PtmoeError(f"{name} cannot be used: {reason}")
    hints, defaults = get_type_hints(kinds[kind]), SHORT[short].defaults if short else {}
    common = {field.name for field in dataclasses.fields(Common)} | WITHHELD.keys() | {"target_modules"}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kinds[kind]):
        if field.name in common or not _is_plain(hints[field.name]):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = defaults.get(field.name, default)
        if default is None and type(None) not in get_args(hints[field.name]):
            default = ...  # peft refuses its own default
        is_free = field.name == FREE.get(kind, "r") and (default is ... or (isinstance(default, int) and default > 0))
        default = 1 if is_free and default is ... else default
        annotation = Size if is_free else hints[field.name]
        text = field.metadata.get("help", f"as in peft's {kinds[kind].__name__}")
        fields[field.name] = (annotation, Field(default, description="".join(text)))  # one is a tuple of texts
    made = create_model(f"{kinds[kind].__name__}", __base__=ShelfConfig, **fields)
    made.method, made.peft_class = short or name, kinds[kind]
    made.tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    made.free_sizes = tuple(one for one, (annotation, _) in fields.items() if annotation is Size)
    made.needs_memory = kind in ON_VALUES
    made.unsupported_quantizations = () if kind in ON_QUANTIZED else QUANTIZATIONS
    named = short or next((one for one in SHORT if SHORT[one].type == kind), None)
    if named is not None:
        made.default_learning_rate = SHORT[named].learning_rate
    if short is not None:
        made.order, made.__doc__ = 900 + list(SHORT).index(short), SHORT[short].paper
    return made


def _is_plain(hint: Any) -> bool:
    """Whether a value of this type can be written in YAML."""
    return not dataclasses.is_dataclass(hint) and all(_is_plain(part) for part in get_args(hint))
