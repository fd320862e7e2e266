"""Methods that change what the base's own layers compute, instead of what stands before the input.

Each is an encoder whose prompt has no tokens, so that training, saving, generation and evaluation take the one way that
prompts take. Because all rows of a batch go through the same layers, a model holds one such adapter and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import InitialEmbeddings, MethodConfig, Prompt, PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightConfig(MethodConfig):
    """A method that changes the base's layers."""

    changes_layers: ClassVar[bool] = True
    num_virtual_tokens: ClassVar[int] = 0
    default_learning_rate: ClassVar[float] = 2e-3


class TargetedConfig(WeightConfig):
    """A method that changes some of the base's linear modules.

    Attributes:
        target_modules: the last part of their names; by default `q_proj` and `v_proj`, and where the base has none,
            what `peft` takes for its architecture (`c_attn` of GPT-2, `query_key_value` of GPT-NeoX, …). A saved
            adapter names them.
    """

    target_modules: list[str] | None = None

    def fitted(self, base: PreTrainedModel) -> list[str]:
        """The names to look for in this base.

        Raises:
            PtmoeError: it has no linear module of such a name; its own are listed.
        """
        names = self.target_modules
        if names is None:
            names = ["q_proj", "v_proj"]
            if not all(named(base, [name]) for name in names):
                from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

                usual = USUAL.get(base.config.model_type, names)
                names = usual if isinstance(usual, list) else names
        check_fit(self.method, base, names)
        return sorted(names)


def named(base: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear modules, by whole name, whose name is one of `names` or ends in `.` and one of them."""
    endings = tuple(f".{name}" for name in names)
    return {whole: module for whole, module in linear_modules(base).items() if f".{whole}".endswith(endings)}


def linear_modules(base: PreTrainedModel) -> dict[str, nn.Module]:
    """All but the one that projects to the vocabulary."""
    from transformers.pytorch_utils import Conv1D

    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def check_fit(method: str, base: PreTrainedModel, names: Iterable[str]) -> None:
    """
    Raises:
        PtmoeError: the base has no linear module of one of these names.
    """
    for name in names:
        if not named(base, [name]):
            known = dict.fromkeys(whole.rpartition(".")[2] for whole in linear_modules(base))
            raise PtmoeError(
                f"{method} does not fit {type(base).__name__}, which has no linear module {name!r}: name some of its "
                f"own in target_modules ({', '.join(known)})"
            )


def size(module: nn.Module) -> tuple[int, int]:
    """How many numbers a linear module takes and gives."""
    if isinstance(module, nn.Linear):  # a 4-bit one's weight has another shape
        return module.in_features, module.out_features
    takes, gives = module.weight.shape  # type: ignore[misc]  # GPT-2's `Conv1D`
    return takes, gives


class WeightEncoder(PromptEncoder):
    """What a weight-side method trains. Its parameters may be the base's own objects, seen from here as well."""

    base: PreTrainedModel

    def __init__(self, config: WeightConfig, base: PreTrainedModel) -> None:
        super().__init__()
        self.config = config
        vars(self)["base"] = base  # not a part of the encoder: it would be saved with it

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        return Prompt(input_embeds.new_zeros(len(input_embeds), 0, input_embeds.shape[2], dtype=torch.float32))

    def initialise(self, source: InitialEmbeddings) -> None:
        """The start values came with the parts."""

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for key, value in self.tensors().items():
            value.copy_(tensors[key])


class Shared(nn.Module):
    """Parameters of another module under the same dotted names, the same objects."""

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
