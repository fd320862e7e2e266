"""Methods that put a small module of their own beside each of some linear modules, and add to its output.

y = W x + b        becomes        y + part(x, y)

The base's modules are kept: a hook hands their input and output to the part. So no weight is copied or rewritten, and a
part that starts at zero leaves the base as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import Batches, InitialEmbeddings, PreTrainedModel, Prompt, quantization_of
from ptmoe.methods.weights import TargetedConfig, WeightEncoder, features_of, is_offloaded, modules_named


class Part(nn.Module):
    """What a method adds to one linear module. The constructor creates its tensors, `initialise` fills them.

    What is trained is a parameter. What is frozen and needed again is a buffer, which is saved with the adapter: a
    decomposition or a random matrix that another machine computes again need not be the same.
    """

    name: str  # of the base's module, in full
    shared: Any  # the module that all parts have in common (`PartsConfig.shared_by`), or None

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__()

    def initialise(self, module: nn.Module, generator: torch.Generator) -> None:
        """Fill the tensors.

        Args:
            module: the base's, for `weight_of` and `leading`.
            generator: the only source of randomness, on the CPU.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        """What is added to the module's output, `(…, out)`.

        Args:
            x: `(…, in)`, float32, what the module got.
            output: `(…, out)`, what the module made of it, with its bias.
            module: the base's, for `weight_of`.
        """
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss in training, or None."""
        return None


class PartsConfig(TargetedConfig):
    """A method that puts a part beside each target module.

    One that reads the weights has `unsupported_quantizations = QUANTIZATIONS`.
    """

    part_class: ClassVar[type[Part]]

    def shared_by(self, features: dict[str, tuple[int, int]]) -> nn.Module | None:
        """What all parts have in common; it has an `initialise(generator)`. Each part finds it as `self.shared`,
        on the embedding's device, while the part itself is on its module's.

        Args:
            features: `(in, out)` of each target module by its full name, from the first layer to the last.
        """
        return None

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> Parts:
        self.check_quantization(quantization_of(base))
        return Parts(self.replace(target_modules=self.target_names(base)), base)


class Parts(WeightEncoder):
    """Tensors: each part's, by the full name of its module, and those of `shared`."""

    config: PartsConfig
    widens = False
    targets: list[tuple[nn.Module, Part]]  # each module of the base with its part

    def __init__(self, config: PartsConfig, base: PreTrainedModel) -> None:
        super().__init__(config, base)
        modules = modules_named(base, config.target_modules or [])
        features = {name: features_of(module) for name, module in modules.items()}
        self.shared = config.shared_by(features)
        parts = [config.part_class(config, *each).float() for each in features.values()]
        for name, part in zip(modules, parts, strict=True):
            vars(part).update(name=name, shared=self.shared)  # not its submodule: it would be saved with each
        # A ModuleDict's keys may have no dots.
        self.parts = nn.ModuleDict({name.replace(".", "/"): part for name, part in zip(modules, parts, strict=True)})
        vars(self)["targets"] = list(zip(modules.values(), parts, strict=True))
        self.enabled = True
        self.hooks = [module.register_forward_hook(partial(self._add, part)) for module, part in self.targets]

    def _add(self, part: Part, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.enabled:
            return output
        added: Tensor = part(arguments[0].float(), output, module)
        return (output + added).to(output.dtype)

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        prompt = super().forward(input_embeds, input_mask)
        if self.training:
            penalties = [penalty for _, part in self.targets if (penalty := part.penalty()) is not None]
            penalties = [penalty.to(input_embeds.device) for penalty in penalties]
            prompt.auxiliary_loss = torch.stack(penalties).sum() if penalties else None
        return prompt

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        if self.shared is not None:
            cast(Any, self.shared).initialise(source.generator)
        for module, part in self.targets:
            part.initialise(module, source.generator)

    def place(self, device: torch.device) -> None:
        """Each part beside its module, which may be on another device than the embedding; at the embedding that of one
        that is offloaded, and what all share."""
        for module, part in self.targets:
            part.to(device if is_offloaded(module) else cast(Tensor, module.weight).device)
        if self.shared is not None:
            self.shared.to(device)

    def tensors(self) -> dict[str, Tensor]:
        shared = {} if self.shared is None else self.shared.state_dict(prefix="shared.")
        return {key.replace("/", "."): value for key, value in (self.parts.state_dict() | shared).items()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def weight_of(module: nn.Module) -> Tensor:
    """The frozen weight `(out, in)` of a linear module, in its own dtype; a quantized one's is of another shape."""
    weight = cast(Tensor, module.weight).detach()
    return weight if isinstance(module, nn.Linear) else weight.T  # GPT-2's `Conv1D`


def decomposed_weight(module: nn.Module) -> Tensor:
    """`weight_of` in float64, for a decomposition.

    Raises:
        PtmoeError: a weight that is offloaded or quantized, or that holds NaN or infinity.
    """
    weight = weight_of(module)
    if not weight.is_floating_point() or weight.element_size() < 2:  # FP8's codes, whose scales are elsewhere
        raise PtmoeError(
            f"a method that decomposes the base's weights cannot read quantized ones ({weight.dtype}): load the base "
            "in bfloat16 or float32"
        )
    weight = weight.double()
    if weight.is_meta or not bool(weight.isfinite().all()):
        fault = "is offloaded: load the base without offloading" if weight.is_meta else "holds NaN or infinity"
        raise PtmoeError(f"a method that decomposes the base's weights cannot read one that {fault}")
    return weight


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """
    Raises:
        PtmoeError: `rank` exceeds that of the module's weight.
    """
    if rank > (limit := min(in_features, out_features)):
        raise PtmoeError(
            f"rank {rank} exceeds min(in, out) = {limit} of a {in_features} × {out_features} module: lower it"
        )


def leading(module: nn.Module, rank: int, blocks: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part of the SVD of a module's frozen weight: `U (out, R)`, `Σ (R,)` and `Vᵀ (R, in)`, float32.

    It is kept with the module, so that the next adapter on this base does not wait for it again. Of each pair of
    vectors, the sign is the one with which the largest entry of `V`'s is positive.

    Args:
        blocks: `(m, n)`; the SVD is then that of the matrix whose `m·n` rows are the weight's `m × n` blocks.

    Raises:
        PtmoeError: as `decomposed_weight`.
    """
    weight = cast(Tensor, module.weight)
    # A cast, or `weight.data = …`, puts other numbers into the same parameter.
    state = id(weight), weight.data_ptr(), weight.dtype, weight._version, blocks
    written, factors = vars(module).get("_leading", (None, ()))
    if written != state or len(factors[1]) < rank:
        # In float64, so that an adapter finds the factors that it was trained on, whatever device decomposes: in
        # float32 vectors of near values differ in the fifth digit between a CPU and a GPU.
        matrix = decomposed_weight(module)
        if blocks is not None:
            matrix = matrix.unflatten(1, (blocks[1], -1)).unflatten(0, (blocks[0], -1))  # (m, p, n, q)
            matrix = matrix.transpose(1, 2).flatten(2).flatten(0, 1)  # (m·n, p·q)
        left, values, right = (one.float() for one in torch.linalg.svd(matrix, full_matrices=False))
        sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()  # (min(in, out), 1)
        factors = (left * sign.T)[:, :rank].clone(), values[:rank].clone(), (right * sign)[:rank].clone()
        vars(module)["_leading"] = state, factors
    left, values, right = factors
    return left[:, :rank], values[:rank], right[:rank]


class SharedByKind(nn.ModuleDict):
    """For `shared_by`: a module for each kind of target module, which those of all layers have in common.

    The kind is the full name without the layer's number, and the shape.

    Args:
        features: as of `shared_by`.
        make: gives the module for the numbers of input and output features, and of the layers.
    """

    def __init__(self, features: dict[str, tuple[int, int]], make: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        kinds: dict[tuple[str, int, int], list[str]] = {}
        for name, shape in features.items():
            words = name.split(".")
            layer = next((index for index, word in enumerate(words) if word.isdigit()), len(words))
            kinds.setdefault((".".join(words[:layer] + words[layer + 1 :]), *shape), []).append(name)
        self.places: dict[str, tuple[str, int]] = {}  # of each target module: its kind's key, and which of its layers
        for (kind, in_features, out_features), names in kinds.items():
            key = f"{kind.replace('.', '/')}/{in_features}x{out_features}"
            self[key] = make(in_features, out_features, len(names))
            self.places |= {name: (key, layer) for layer, name in enumerate(names)}

    def of(self, part: Part) -> tuple[Any, int]:
        """What a part shares, and which of the layers that share it is its own."""
        key, layer = self.places[part.name]
        return self[key], layer

    def initialise(self, generator: torch.Generator) -> None:
        for module in self.values():
            cast(Any, module).initialise(generator)
