"""What every method is: a config, and a prompt encoder with one job.

(input_embeds (B, L, H), input_mask (B, L)) -> Prompt(embeds (B, T, H), routing)

A method that changes the base's layers is an encoder too; few have virtual tokens (`ptmoe.methods.weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.fast.passes import Changes
from ptmoe.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel as PreTrainedModel
else:
    PreTrainedModel = Any  # importing it takes a second

Batches = Iterable[dict[str, Tensor]]  # training data: `input_ids`, `attention_mask` and `labels`, (B, L) each
Size = Annotated[int, Field(ge=1)]  # a field of this type is part of what a table calls the method's size
QUANTIZATIONS = ("8bit", "4bit")
NARROW = 384  # hidden size: learning rates were searched at 192 (nano) and 576 (SmolLM2), this is midway


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
        gate: `(B, N)`, the factor that each expert was multiplied by.
        probabilities: `(B, N)`, the router's softmax.
    """

    gate: Tensor
    probabilities: Tensor


@dataclass
class Prompt:
    """What an encoder puts before the input.

    Attributes:
        embeds: `(B, T, H)` in float32, the soft prompt of each row.
        routing: how each row was routed, if the method routes.
        cache: `(layers, 2, B or 1, heads, T, d)`, keys and values before those of the input, 1 where rows share them.
        auxiliary_loss: a scalar added to the loss in training, or None.
        changes: numbers, by which hooks in the base's layers change what they compute for each row.
    """

    embeds: Tensor
    routing: Routing | None = None
    cache: Tensor | None = None
    auxiliary_loss: Tensor | None = None
    changes: Changes | None = None


class MethodConfig(Settings):
    """The settings of a method and, as class variables, what the rest of the program asks about it."""

    method: ClassVar[str]  # its name in `METHODS`, on the command line and in files
    order: ClassVar[int] = 1000  # place in `METHODS`, tables and legends; equal ones are sorted by name
    figure_color: ClassVar[tuple[str, str] | None] = None  # on a light and on a dark background
    figure_marker: ClassVar[str | None] = None  # of matplotlib
    default_learning_rate: ClassVar[float] = 0.03
    narrow_learning_rate: ClassVar[float | None] = None  # on a base that is narrower than `NARROW`; None is the same
    free_sizes: ClassVar[tuple[str, ...]] = ()  # fields that a parameter budget may set, the first choice first
    routes: ClassVar[bool] = False  # its prompts carry a `Routing`
    needs_memory: ClassVar[bool] = False  # has no form on the meta device, so counting it takes the base's zeros
    reads_input: ClassVar[bool] = False  # an input's prompt depends on its tokens
    fills_cache: ClassVar[bool] = False  # its prompt is in the key-value cache
    adds_loss: ClassVar[bool] = False  # its prompts carry an `auxiliary_loss`
    changes_layers: ClassVar[bool] = False  # for all rows alike: a model holds one such adapter and no other
    changes_rows: ClassVar[bool] = False  # its prompts carry `changes` of the base's layers, each row's its own
    divides_rows: ClassVar[bool] = False  # rows of a batch train different parameters: no packing, whole last layer
    trains_base: ClassVar[bool] = False  # its parameters are the base's own weights: too many to copy at every step
    unsupported_quantizations: ClassVar[tuple[str, ...]] = ()
    shorthands: ClassVar[dict[str, FieldInfo]] = {}  # keys that set several fields at once; options of `ptmoe train`
    retired: ClassVar[dict[str, Any]] = {}  # removed fields, and the value at which they had no effect

    if TYPE_CHECKING:

        @property
        def num_virtual_tokens(self) -> int: ...

    @model_validator(mode="before")
    @classmethod
    def _drop_retired_fields(cls, values: Any) -> Any:
        """Adapters and run configs written by earlier versions still carry them."""
        if not isinstance(values, dict):
            return values
        for name, default in cls.retired.items():
            if values.get(name, default) != default:
                raise ValueError(
                    f"{name}={values[name]!r}: the option {name} was removed, and only {name}={default!r} still works; "
                    "an adapter trained with another value needs the version of ptmoe that trained it"
                )
        return {name: value for name, value in values.items() if name not in cls.retired}

    @property
    def peft_type(self) -> str:
        return self.method.upper().replace("-", "_")

    @property
    def needs_batches(self) -> bool:
        """Whether it starts from training data, which `attach` then needs."""
        return False

    @property
    def soft_gate(self) -> bool:
        """Whether an input's prompt mixes several experts, instead of choosing one."""
        return False

    @classmethod
    def learning_rate_on(cls, base_config: Any) -> float:
        """The learning rate where none is given, on a base with this config of `transformers`."""
        width = getattr(base_config.get_text_config(), "hidden_size", NARROW)
        return cls.narrow_learning_rate if width < NARROW and cls.narrow_learning_rate else cls.default_learning_rate

    @classmethod
    def shares_batch(cls) -> bool:
        """Whether rows of one batch may each have another adapter of this kind."""
        return not (cls.changes_layers or cls.fills_cache)

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> PromptEncoder:
        """The encoder for this base. The tensors of a prompt are not yet initialised; a method that changes layers has
        put its parts into the base, initialised from the global random state.

        Args:
            base: the model, or one on the meta device to count parameters on.
            batches: training data, for methods with `needs_batches`.

        Raises:
            PtmoeError: a base that the method does not fit, which is left as it was.
        """
        raise NotImplementedError

    def saved_encoder_for(self, base: PreTrainedModel) -> PromptEncoder:
        """An encoder whose `tensors()` have the keys and shapes of a saved adapter's."""
        return self.encoder_for(base)

    @classmethod
    def check_quantization(cls, quantization: str | None) -> None:
        """
        Raises:
            PtmoeError: the method does not work on a base of this quantization (`quantization_of`).
        """
        if quantization in cls.unsupported_quantizations:
            supported = [name for name in QUANTIZATIONS if name not in cls.unsupported_quantizations]
            raise PtmoeError(
                f"{cls.method} does not work on a base of {quantization} weights, only on "
                f"{' or '.join(['plain', *supported])} ones: change the quantization, or use another method"
            )


class VirtualTokensConfig(MethodConfig):
    """A method whose prompt is virtual tokens.

    Attributes:
        num_virtual_tokens: `T`, the length of the soft prompt.
    """

    free_sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens",)
    retired: ClassVar[dict[str, Any]] = {"position": "before"}
    num_virtual_tokens: Size = 40

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> PromptEncoder:
        return self.build(base.get_input_embeddings().weight.shape[1])

    def build(self, hidden_size: int) -> PromptEncoder:
        """The encoder with uninitialised tensors; on the meta device it takes no memory.

        Raises:
            PtmoeError: a size that does not fit `hidden_size`.
        """
        raise NotImplementedError


class PromptConfig(VirtualTokensConfig):
    """A soft prompt that starts from the base's embeddings.

    Attributes:
        num_virtual_tokens: `T`, the length of the soft prompt.
        init: where the prompt starts. `"vocabulary"`: embeddings of random tokens of the vocabulary; `"text"`: the
            embeddings of `init_text`, repeated or cut to `T`; `"examples"`: the embeddings of training examples with
            their answers, as many as fit, the first cut on the left; `"random"`: normal, at the scale of the
            embeddings.
        init_text: a text that describes the task, for `init="text"`.
    """

    init: Literal["vocabulary", "text", "examples", "random"] = "vocabulary"
    init_text: str | None = None

    @property
    def needs_batches(self) -> bool:
        return self.init == "examples"

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
    widens: ClassVar[bool] = False  # computes in the base's dtype where that is wider than float32

    def __init__(self, config: MethodConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        """By default every row gets the single prompt of `fixed_prompts`.

        Args:
            input_embeds: `(B, L, H)`, the base's embeddings of the row.
            input_mask: `(B, L)`, true at the tokens that may decide the prompt: no padding, no answer.
        """
        if (prompt := self.fixed_prompts()) is None:
            raise NotImplementedError
        return Prompt(prompt.expand(len(input_embeds), -1, -1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """A cast of the whole model (`model.to(torch.bfloat16)`, `.double()`, DeepSpeed) leaves it in float32."""
        return cast(Self, super()._apply(in_full_precision(fn, wider=self.widens), recurse))

    def initialise(self, source: InitialEmbeddings) -> None:
        """Fill the tensors from the base's embeddings, with no randomness but that of `source`'s generator."""
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        """Move it to the device of the base's embedding."""
        self.to(device)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the base computes what it did without the method.

        Raises:
            PtmoeError: a method that cannot be disabled.
        """
        yield

    def remove(self) -> None:
        """Restore the base to what it was before.

        Raises:
            PtmoeError: a method that cannot be removed.
        """

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Within it an error, or an interrupt, takes the method off the base again."""
        try:
            yield
        except BaseException:
            with suppress(PtmoeError):  # of one that cannot be removed: the first error is the one to show
                self.remove()
            raise

    def optimizer(self, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer | None:
        """The method's own optimizer of its parameters; None leaves the choice to the trainer."""
        return None

    def peft_config(self) -> dict[str, Any] | None:
        """The `adapter_config.json` with which `peft` reads `tensors()`; None where `peft` has no such format."""
        return None

    def expert_prompts(self) -> Tensor | None:
        """`(N, T, H)`, the prompts that the gate weights; None for a method without experts."""
        return None

    def fixed_prompts(self) -> Tensor | None:
        """`(N, T, H)`, prompts of which each input gets exactly one, unchanged, in evaluation: the one with the highest
        gate, or the only one; None where prompts are composed for each input."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The content of the adapter folder, by key: the published form."""
        return dict(self.state_dict())

    def training_log(self) -> dict[str, float | list[float]]:
        """Values for the training log, collected since the last call."""
        return {}

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs in addition to `tensors()` to resume exactly."""
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `training_state()` returned."""

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors whose keys and shapes have been checked against `tensors()`."""
        self.load_state_dict(tensors)


def in_full_precision(move: Callable[[Tensor], Tensor], *, wider: bool = True) -> Callable[[Tensor], Tensor]:
    """What `move` does to a tensor, but for a cast to a narrower floating point type or, without `wider`, to any."""

    def moved(tensor: Tensor) -> Tensor:
        to = move(tensor)
        kept = to.dtype.itemsize < tensor.dtype.itemsize if wider else to.dtype != tensor.dtype
        return tensor.to(to.device) if tensor.is_floating_point() and kept else to

    return moved


@torch.no_grad()
def fill_as_linear(parameter: Tensor, in_features: int, generator: torch.Generator) -> None:
    """Uniform values in `±in_features^-½`, as `torch.nn.Linear` has them, but from the given generator."""
    parameter.copy_(in_features**-0.5 * (2 * torch.rand(parameter.shape, generator=generator) - 1))


@dataclass
class InitialEmbeddings:
    """Where prompts start: `(T, H)` embeddings of the base.

    Attributes:
        embedding: the base's input embedding, called rather than read: Gemma's scales its rows by √H.
        generator: the only source of randomness.
        tokenize: text to token ids, for `init="text"`.
        read_prompt: the checked prompt `(T, H)` of a saved `pt` or `fwd-prompt` adapter of this base, by its folder.
        batches: training data, for `init="examples"`.
    """

    embedding: nn.Module
    generator: torch.Generator
    tokenize: Callable[[str], list[int]] | None = None
    read_prompt: Callable[[str], Tensor] | None = None
    batches: Batches | None = None

    def rows(self, config: PromptConfig, count: int) -> Tensor:
        """`(count, H)` initial values in float32, as `config.init` says."""
        vocabulary, hidden = cast(Tensor, self.embedding.weight).shape
        if config.init == "text":
            assert config.init_text is not None
            return self.text(config.init_text, count)
        if config.init == "examples":
            return self.examples(count)
        if config.init == "vocabulary":
            return self.embed(torch.randint(vocabulary, (count,), generator=self.generator))
        # The standard deviation of the whole vocabulary would read gigabytes; that of a sample is as good.
        scale = self.embed(torch.arange(0, vocabulary, max(1, vocabulary // 1024))).std()
        return scale * self.normal(count, hidden)

    def text(self, text: str, count: int) -> Tensor:
        """`(count, H)`: the embeddings of `text`, repeated or cut to `count` tokens.

        Raises:
            PtmoeError: there is no tokenizer, or the text has no tokens.
        """
        if self.tokenize is None:
            raise PtmoeError("init='text' needs the base's tokenizer: attach(base, config, tokenizer=…)")
        if not (ids := self.tokenize(text)):
            raise PtmoeError(f"init_text={text!r} has no tokens: give a text that fits the task")
        return self.embed(torch.tensor((ids * -(-count // len(ids)))[:count]))

    def examples(self, count: int) -> Tensor:
        """`(count, H)`: embeddings of the last `count` tokens of training examples in random order, repeated if few."""
        assert self.batches is not None
        rows: list[Tensor] = []
        for batch in self.batches:
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            rows += batch["input_ids"][real].split(real.sum(1).tolist())
        ids = torch.cat([rows[i] for i in torch.randperm(len(rows), generator=self.generator)])
        return self.embed(ids.repeat(-(-count // len(ids)))[-count:])

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(ids.to(cast(Tensor, self.embedding.weight).device))
        return embeds.detach().float().cpu()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)
