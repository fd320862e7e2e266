"""Methods that change what the base's own layers compute, instead of what comes before the input.

Each is an encoder, most with a prompt without tokens, so training, saving, generation and evaluation treat it like any
other. Because all rows of a batch go through the same layers, a model holds one such adapter and no other.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar, TypeGuard

import torch
from pydantic import field_validator
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import (
    InitialEmbeddings,
    MethodConfig,
    PreTrainedModel,
    Prompt,
    PromptEncoder,
    VirtualTokensConfig,
)


def needs_no_base(config: MethodConfig) -> TypeGuard[VirtualTokensConfig]:
    """Whether its encoder is built and its prompt composed from the base's embeddings alone."""
    return isinstance(config, VirtualTokensConfig) and not (config.changes_layers or config.changes_rows)


class WeightConfig(MethodConfig):
    """A method that changes the base's layers."""

    changes_layers = True
    num_virtual_tokens: ClassVar[int] = 0
    default_learning_rate = 2e-3


class TargetsConfig(MethodConfig):
    """A method that names some of the base's linear modules.

    Attributes:
        target_modules: the last part of their names; by default `q_proj` and `v_proj`, or where the base lacks one of
            them, `peft`'s default for its architecture (`c_attn` of GPT-2, `query_key_value` of GPT-NeoX, …). A saved
            adapter names them.
    """

    target_modules: list[str] | None = None

    @field_validator("target_modules")
    @classmethod
    def _in_one_order(cls, names: list[str] | None) -> list[str] | None:
        """That of a saved config, so that the command of a run is the one that resumes it."""
        return None if names is None else sorted(set(names))

    def target_names(self, base: PreTrainedModel) -> list[str]:
        """The module names to change in this base.

        Raises:
            PtmoeError: it has no linear module of such a name; the names it has are listed.
        """
        names = set(self.default_names(base) if self.target_modules is None else self.target_modules)
        for name in names:
            if not modules_named(base, [name]):
                raise PtmoeError(
                    f"{self.method} does not fit {type(base).__name__}, which has no linear module {name!r}: name some "
                    f"of its own in target_modules ({linear_names(base)})"
                )
        return sorted(names)

    def default_names(self, base: PreTrainedModel) -> list[str]:
        names = ["q_proj", "v_proj"]
        if all(modules_named(base, [name]) for name in names):
            return names
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        defaults = DEFAULTS.get(base.config.model_type)
        return defaults if isinstance(defaults, list) else names


class TargetedConfig(TargetsConfig, WeightConfig):
    """A method that changes some of the base's linear modules, and has no prompt."""


def linear_modules(base: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear modules, by full name, but the one that projects to the vocabulary."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def linear_names(base: PreTrainedModel) -> str:
    """The last parts of their names, for an error message."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear_modules(base)))


def modules_named(base: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear modules, by full name, whose name is one of `names` or ends in `.` and one of them."""
    endings = tuple(f".{name}" for name in names)
    return {full: module for full, module in linear_modules(base).items() if f".{full}".endswith(endings)}


def features_of(module: nn.Module) -> tuple[int, int]:
    """The numbers of input and output features of a linear module."""
    # The weight of a 4-bit one has another shape, and none is here of one that ZeRO-3 shares.
    sizes = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("nx", "nf")  # GPT-2's `Conv1D`
    return getattr(module, sizes[0]), getattr(module, sizes[1])


def is_offloaded(module: nn.Module) -> bool:
    """Whether its own weights are elsewhere until a hook of `accelerate` brings them, for as long as it computes."""
    return hasattr(module, "_hf_hook") and any(one.is_meta for one in module.parameters(recurse=False))


class WeightEncoder(PromptEncoder):
    """The trainable part of a weight-side method. Its parameters may be the base's own objects, shared with it."""

    base: PreTrainedModel
    widens = True

    def __init__(self, config: WeightConfig, base: PreTrainedModel) -> None:
        super().__init__(config)
        vars(self)["base"] = base  # not a submodule: it would be saved with the adapter

    def check_in_memory(self, trained: Iterable[Tensor]) -> None:
        """
        Raises:
            PtmoeError: numbers that are to train are in layers that are offloaded, where they would be lost.
        """
        if any(one.is_meta for one in trained) and any(map(is_offloaded, self.base.modules())):
            raise PtmoeError(
                f"{self.config.method} trains within the layers of {type(self.base).__name__}, of which some are "
                "offloaded: load the base without offloading, or take a method of prompts"
            )

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        return Prompt(input_embeds.new_zeros(len(input_embeds), 0, input_embeds.shape[2], dtype=torch.float32))

    def place(self, device: torch.device) -> None:
        """What is in the base stays with its layers, which may be on several devices."""
        in_base = {id(one) for one in self.base.parameters()}
        self._apply(lambda one: one if id(one) in in_base else one.to(device))

    def initialise(self, source: InitialEmbeddings) -> None:
        """The parts were initialised when they were created."""

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for key, value in self.tensors().items():
            value.copy_(tensors[key])


class SharedParameters(nn.Module):
    """Parameters of another module under the same dotted names; the same objects, not copies."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, parameter)
