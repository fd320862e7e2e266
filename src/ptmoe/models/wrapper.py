"""`ModelWrapper`: a base model and its adapters with the attributes of a `transformers` model."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from ptmoe.adapters.identity import fingerprint
from ptmoe.errors import PtmoeError
from ptmoe.fast.lock import base_lock
from ptmoe.methods.base import MethodConfig, PromptEncoder, Routing, in_full_precision
from ptmoe.models.adapter_set import AdapterSet
from ptmoe.models.elsewhere import ELSEWHERE
from ptmoe.models.input_path import InputPath, ScaledEmbedding, measure
from ptmoe.models.saving import SavingModel

CHANGED_BY = "ptmoe_method"  # an attribute of a base whose layers a method has changed


class ModelWrapper(SavingModel):
    """What a base and its adapters are to those who hold a model.

    Attributes:
        base_model: the frozen model; with a weight-side adapter, that adapter's parts are in it.
        adapters: the `AdapterSet`.
        encoders: its encoders, by name.
        path: how the base takes what stands in for token ids.
    """

    input_modalities = output_modalities = ("text",)  # `pipeline` asks for them
    base_model: PreTrainedModel
    path: InputPath
    adapters: AdapterSet

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        embedding = base.get_input_embeddings()
        if embedding.weight.device.type == "meta":
            raise PtmoeError(
                f"the input embedding of this {type(base).__name__} is offloaded, and prompts are made from it: load "
                "the base with a device_map that keeps it in memory"
            )
        with base_lock(base):
            self.path = measure(base)
        base.requires_grad_(False)
        self.base_model = base
        if self.path.scale != 1.0:
            embedding = ScaledEmbedding(embedding, self.path.scale)
        vars(self)["adapters"] = AdapterSet(embedding, base)
        self.encoders = self.adapters.encoders  # named as in `state_dict()`
        # As it is before any training: full fine-tuning changes the embedding.
        self._fingerprint = fingerprint(base.get_input_embeddings().weight)
        self.train(base.training)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        config: MethodConfig,
        make: Callable[[PreTrainedModel], PromptEncoder] | None = None,
        *,
        activate: bool = True,
    ) -> PromptEncoder:
        """Add the encoder that `make` gives for the base, and, if asked, make it the active one; the first always is.
        `attach(model, config, adapter_name=…)` gives one that is initialised.

        Raises:
            PtmoeError: a name that cannot be used, or adapters that one model cannot hold together.
        """
        if make is None:
            raise PtmoeError(f"a fresh adapter beside the others: ptmoe.attach(model, config, adapter_name={name!r})")
        self.adapters.check_addable(name, config)
        self.check_unchanged()
        encoder = make(self.base_model)
        with encoder.removed_on_failure():
            self.adapters.add(name, encoder)
        if config.changes_layers:
            vars(self.base_model)[CHANGED_BY] = config.method
        if activate or not self.active_adapter:
            self.adapters.activate(name)
        return encoder

    def check_unchanged(self) -> None:
        """
        Raises:
            PtmoeError: an adapter of another model changes the base's layers, and so whatever this one computes.
        """
        if not self.adapters.changes_layers:
            check_unchanged(self.base_model)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter in a list, as in `peft`; empty without one."""
        return [self.active_adapter] if self.active_adapter else []

    def set_adapter(self, name: str) -> None:
        """Make one adapter the active one: used where no `adapter_names` are given, and the one that trains."""
        self.adapters.activate(name)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not the active one, or a weight-side one, whose parts are taken out of the base.

        Raises:
            PtmoeError: no such adapter, the active one, or one that cannot be taken out (`ft`).
        """
        changed_layers = self.adapters.changes_layers
        self.adapters.remove(name)
        if changed_layers:
            vars(self.base_model).pop(CHANGED_BY)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is its untouched base.

        Raises:
            PtmoeError: `ft`, which has changed the base for good.
        """
        before, self.adapters.enabled = self.adapters.enabled, False
        try:
            with self.encoder.disabled() if before and self.active_adapter else nullcontext():
                yield
        finally:
            self.adapters.enabled = before

    @property
    def active_adapter(self) -> str:
        """The name of the adapter in use; `""` without one."""
        return self.adapters.active

    @property
    def uses_adapter(self) -> bool:
        return self.adapters.in_use

    @property
    def encoder(self) -> PromptEncoder:
        """The active adapter's encoder."""
        return self.adapters[self.active_adapter]

    @property
    def method_config(self) -> MethodConfig:
        """The active adapter's config."""
        return self.encoder.config

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that the active adapter's prompt takes; 0 without one."""
        return self.method_config.num_virtual_tokens if self.uses_adapter else 0

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Routing | None:
        """How the active adapter routes these inputs `(B, L)`; None for a method that does not route."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.adapters.encode(self.adapters.embed(input_ids), mask.bool()).routing

    # -- a transformers model ----------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.base_model.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.base_model.dtype)

    @property
    def name_or_path(self) -> str:
        return cast(str, self.base_model.name_or_path)

    @property
    def lock(self) -> Any:
        """Held while the base's forward pass runs (`ptmoe.fast.lock.base_lock`)."""
        return base_lock(self.base_model)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.base_model.get_output_embeddings())

    def can_generate(self) -> bool:
        return True

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Of a base that is spread over devices, which `Trainer` then leaves there; others have none."""
        return cast(dict[str, Any], cast(Any, self.base_model).hf_device_map)

    @property
    def loss_type(self) -> str | None:
        """By it `Trainer` counts supervised tokens: a row's first one has a predictor behind virtual tokens alone."""
        spliced = self.num_virtual_tokens and not self.method_config.fills_cache
        return None if spliced else "ForCausalLM"

    def _replicate_for_data_parallel(self) -> Self:
        raise PtmoeError(
            "one process for several GPUs (nn.DataParallel) would copy the base at every step: start one for each with "
            "torchrun or accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """`trl`'s trainers call it at the end of their construction: all but the bridge, which adds `"ptmoe"`, are
        refused here, before anything is trained.

        Raises:
            PtmoeError: `trl` without the bridge.
        """
        if "trl" in tags and "ptmoe" not in tags:
            raise PtmoeError(
                "trl cannot train a prompted model by itself: its fused head replaces forward, runs the base model "
                "without the prompt and keeps the labels to itself, so a router would average the answers too. For "
                "supervised fine-tuning use SFTTrainer from ptmoe.train.trl"
            )

    def __getattr__(self, name: str) -> Any:
        if name in ELSEWHERE:
            raise AttributeError(f"{type(self).__name__} has no {name}: {ELSEWHERE[name]}")
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Of a cast to half precision, adapters stay in float32, also those whose parts are in the base."""
        adapters = [cast(PromptEncoder, encoder) for encoder in self.encoders.values()]
        owned = (parameter for one in adapters if not one.config.trains_base for parameter in one.parameters())
        kept = {id(tensor) for parameter in owned for tensor in (parameter, parameter.grad)} - {id(None)}
        whole = in_full_precision(fn)
        return cast(Self, super()._apply(lambda one: whole(one) if id(one) in kept else fn(one), recurse))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.base_model.activation_checkpointing_enable(**options)

    def activation_checkpointing_disable(self) -> None:
        self.base_model.activation_checkpointing_disable()

    # Their names before transformers 5.
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable

    def check_cache(self) -> None:
        """
        Raises:
            PtmoeError: the base drops its cache, so each new token would be made from the one before it alone.
        """
        if self.training and getattr(self.base_model, "is_activation_checkpointing", False):
            raise PtmoeError(
                "gradient checkpointing drops the cache, which generation and a prompt in the cache need: leave it "
                "out, or call model.eval()"
            )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        excluded = {id(p) for p in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        return sum(
            _size(p) for p in self.parameters() if (p.requires_grad or not only_trainable) and id(p) not in excluded
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


def check_unchanged(base: PreTrainedModel) -> None:
    """
    Raises:
        PtmoeError: a model's adapter changes the base's layers.
    """
    if (changed_by := vars(base).get(CHANGED_BY)) is not None:
        raise PtmoeError(
            f"this base holds a {changed_by} adapter of another model, which changes its layers: load the base again"
        )


def _size(parameter: nn.Parameter) -> int:
    """Numbers that are kept: none of what only helps to train (`PTMoE.S`); `bitsandbytes` packs two into a byte."""
    held = getattr(parameter, "quant_state", None) or parameter
    return 0 if hasattr(parameter, "passing") else math.prod(getattr(held, "ds_shape", held.shape))
