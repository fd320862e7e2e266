"""What every method is: a config, and a prompt encoder with one job.

(input_embeds (B, L, H), input_mask (B, L)) -> Prompt(embeds (B, T, H), routing)

A method that changes the base's weights is an encoder too: its prompt has no tokens (`ptmoe.methods.weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Iterable[dict[str, Tensor]]  # of training: `input_ids`, `attention_mask` and `labels`, (B, L) each
Size = Annotated[int, Field(ge=1)]
QUANTIZATIONS = ("8bit", "4bit")


def quantization_of(base: PreTrainedModel) -> str | None:
    """`"8bit"` or `"4bit"`, the name of another library's method, or None for plain weights."""
    if not getattr(base, "is_quantized", False):
        return None
    for name in QUANTIZATIONS:
        if getattr(base, f"is_loaded_in_{name}", False):
            return name
    method = base.hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


@dataclass
class Routing:
    """How each input was routed among `N` experts.

    Attributes:
        gate: `(B, N)`, what each expert's factor was multiplied by.
        probabilities: `(B, N)`, the router's softmax.
    """

    gate: Tensor
    probabilities: Tensor


@dataclass
class Prompt:
    """What an encoder puts before the input.

    Attributes:
        embeds: `(B, T, H)` in float32, the soft prompt of each row.
        routing: of each row, where the method routes.
        cache: `(layers, 2, heads, T, d)`, keys and values that every layer finds before the input's, the same for all
            rows; or None.
        auxiliary_loss: a scalar added to the loss in training, or None.
    """

    embeds: Tensor
    routing: Routing | None = None
    cache: Tensor | None = None
    auxiliary_loss: Tensor | None = None


class MethodConfig(Settings):
    """What all methods share: what they are called and how they are put on a base."""

    method: ClassVar[str]
    default_learning_rate: ClassVar[float] = 0.03
    needs_batches: ClassVar[bool] = False  # starts from the activations that training inputs give
    fills_cache: ClassVar[bool] = False  # its prompt stands in the cache of all rows
    alone: ClassVar[bool] = False  # changes what the base computes: a model holds one such adapter and no other
    unfit_on: ClassVar[tuple[str, ...]] = ()  # quantizations of the base that it cannot do with
    shorthands: ClassVar[dict[str, FieldInfo]] = {}  # keys that set several fields at once; options of `ptmoe train`

    if TYPE_CHECKING:

        @property
        def num_virtual_tokens(self) -> int: ...

    @property
    def peft_type(self) -> str:
        return self.method.upper().replace("-", "_")

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> PromptEncoder:
        """The encoder for this base. A prompt's tensors are not yet initialised; a method that changes the base's
        weights has put its parts into the base, drawn from the global random state.

        Args:
            base: the model, or one on the meta device to count parameters on.
            batches: of training, for methods with `needs_batches`.

        Raises:
            PtmoeError: a base that the method does not fit, which is then as it was.
        """
        raise NotImplementedError

    @classmethod
    def check_quantization(cls, quantization: str | None) -> None:
        """
        Raises:
            PtmoeError: the method cannot do with a base of this quantization (`quantization_of`).
        """
        if quantization in cls.unfit_on:
            fit = " or ".join(["plain", *(one for one in QUANTIZATIONS if one not in cls.unfit_on)])
            raise PtmoeError(
                f"{cls.method} does not work on a base of {quantization} weights, only on {fit} ones: change the "
                "quantization, or use another method"
            )

    def on_saved(self, base: PreTrainedModel) -> PromptEncoder:
        """The encoder whose `tensors()` have the keys and shapes that were saved: where it differs from `on`."""
        return self.on(base)


class VirtualTokensConfig(MethodConfig):
    """A method whose prompt is virtual tokens.

    Attributes:
        num_virtual_tokens: `T`, the length of the soft prompt.
        position: right before the first real token, or right after it, where a base's own start token stays first.
    """

    num_virtual_tokens: Size = 40
    position: Literal["before", "after"] = "before"

    def on(self, base: PreTrainedModel, batches: Batches | None = None) -> PromptEncoder:
        return self.build(base.get_input_embeddings().weight.shape[1])

    def build(self, hidden_size: int) -> PromptEncoder:
        """The encoder, its tensors not yet initialised; on the meta device it costs nothing.

        Raises:
            PtmoeError: a size that does not fit `hidden_size`.
        """
        raise NotImplementedError


class PromptConfig(VirtualTokensConfig):
    """A soft prompt that starts from the base's embeddings.

    Attributes:
        num_virtual_tokens: `T`, the length of the soft prompt.
        position: right before the first real token, or right after it.
        init: where the prompt starts. `"vocabulary"`: embeddings of tokens drawn from the vocabulary; `"text"`:
            the embeddings of `init_text`, repeated or cut to `T`; `"random"`: normal, at the embeddings' own scale.
        init_text: a text that fits the task, for `init="text"`.
    """

    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    init_text: str | None = None

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError(
                f"init={self.init!r} with init_text={self.init_text!r}: give a text together with init='text'"
            )
        return self


class PromptEncoder(nn.Module):
    """Composes a soft prompt for each input. Parameters are float32 whatever the base's dtype."""

    config: MethodConfig

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        """
        Args:
            input_embeds: `(B, L, H)`, the base's embeddings of the row.
            input_mask: `(B, L)`, true at the tokens that may decide the prompt: no padding, no answer.
        """
        raise NotImplementedError

    def initialise(self, source: InitialEmbeddings) -> None:
        """Fill the tensors from the base's embeddings; draws only from `source`'s generator."""
        raise NotImplementedError

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the base computes what it did without the method.

        Raises:
            PtmoeError: a method that cannot.
        """
        yield

    def remove(self) -> None:
        """Leave the base as it was before.

        Raises:
            PtmoeError: a method that cannot.
        """

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """The method's own optimizer of its parameters; None for what the trainer would choose."""
        return None

    def peft_config(self) -> dict[str, Any] | None:
        """The `adapter_config.json` with which `peft` reads `tensors()`; None where it has no form for them."""
        return None

    def expert_prompts(self) -> Tensor | None:
        """The `N` prompts that the gate chooses from, `(N, T, H)`; None where there is nothing to choose."""
        return None

    def fixed_prompts(self) -> Tensor | None:
        """`(N, T, H)`, prompts of which each input has exactly one, as it is, in evaluation: the one with the highest
        gate, or the only one; None where prompts are composed for each input."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """What the adapter folder holds, by key: the published form."""
        return dict(self.state_dict())

    def training_log(self) -> dict[str, float | list[float]]:
        """What training has to say of the encoder since it was last asked, for the logs."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside `tensors()` to go on exactly where it stopped."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `training_state()` gave."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over tensors whose keys and shapes have been checked against `tensors()`."""
        self.load_state_dict(tensors)


def mean_input(input_embeds: Tensor, input_mask: Tensor) -> Tensor:
    """The mean embedding `(B, H)`, float32, of each row's input tokens.

    The real tokens are packed before they are summed, so each row's sum runs over the same numbers in the same order
    whatever the padding, the batch or the answer: the routing is the same to the bit. The base is frozen, so no
    gradient is kept.

    Raises:
        ValueError: a row without input tokens.
    """
    with torch.no_grad():
        lengths = input_mask.sum(1)
        if (lengths == 0).any():
            rows = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"rows {rows} have no input token for the router to read: every real token is supervised or padding. "
                "Set the labels of the prompt's tokens to -100, or pass input_mask"
            )
        packed = input_embeds[input_mask].float()  # (tokens, H)
        return torch.segment_reduce(packed, "sum", lengths=lengths, axis=0, unsafe=True) / lengths[:, None]


@dataclass
class InitialEmbeddings:
    """Draws the `(T, H)` embeddings that prompts start from.

    Attributes:
        embedding: the base's input embedding, called rather than read: Gemma's scales its rows by √H.
        generator: the only source of chance.
        tokenize: text to token ids, for `init="text"`.
    """

    embedding: nn.Module
    generator: torch.Generator
    tokenize: Callable[[str], list[int]] | None = None

    @property
    def weight(self) -> Tensor:
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    def rows(self, config: PromptConfig, count: int) -> Tensor:
        """`(count, H)` float32 start values as `config.init` says."""
        if config.init == "text":
            assert config.init_text is not None
            return self.text(config.init_text, count)
        if config.init == "vocabulary":
            return self.embed(torch.randint(len(self.weight), (count,), generator=self.generator))
        # Over the whole vocabulary a standard deviation would cost a pass over gigabytes; a sample says as much.
        scale = self.embed(torch.arange(0, len(self.weight), max(1, len(self.weight) // 1024))).std()
        return scale * self.normal(count, self.weight.shape[1])

    def text(self, text: str, count: int) -> Tensor:
        """`(count, H)`: the embeddings of `text`, repeated or cut to `count` tokens."""
        ids = self.token_ids(text)
        return self.embed(torch.tensor((ids * -(-count // len(ids)))[:count]))

    def token_ids(self, text: str) -> list[int]:
        if self.tokenize is None:
            raise PtmoeError("init='text' needs the base's tokenizer: attach(base, config, tokenizer=…)")
        ids = self.tokenize(text)
        if not ids:
            raise PtmoeError(f"init_text={text!r} has no tokens: give a text that fits the task")
        return ids

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(ids.to(self.weight.device))
        return embeds.detach().float().cpu()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)
