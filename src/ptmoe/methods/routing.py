"""Routing: from the mean input embedding to a gate over the experts, and what training a router needs.

ℓ  = W x̄ + b                       W: (N, H), b: (N,)
ℓ' = ℓ ⊙ (1 + ε),  ε ~ N(0, σ²)     in training only
p  = softmax(ℓ')
g  = p ⊙ 1[i = argmax p]            selective, probationary

A method with a router derives its config from `RoutedConfig` and its encoder from `RoutedEncoder`; `RoutingCallback`
(`ptmoe.train.routing`) then trains its router as the config says.
"""

import warnings
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.methods.base import Prompt, PromptConfig, PromptEncoder, Routing, Size, fill_as_linear
from ptmoe.methods.inputs import mean_input

# The standard deviation of a standardised input. An adaptive optimizer moves every parameter at the same pace whatever
# its gradient, so inputs below 1 let the router decide more slowly than the experts learn: at 1 it commits before they
# differ, and two kinds of input end up with one expert; at 1/6 it has not decided in time (docs/findings.md).
SPREAD = 1 / 3
# The router's highest learning rate, times H: such an optimizer moves a logit by up to `H · SPREAD` rates in a step, so
# at the rate that a prompt needs on a wide base the router would forget its start at once (docs/findings.md).
ROUTER_RATE = 5.76
CERTAIN = 1000.0  # a logit so large that the other experts' probability is 0 in any floating type, whatever the noise
CONFIDENCE_PACE = 0.05  # of the running mean of the largest probability, per training step
# What `state_dict()` holds while training lasts, beside the tensors of the published form.
PROGRESS = ("hardness", "confidence", "together")
TRAINING_STATE = (*PROGRESS, "router.mean", "router.scale", "router.pace")


class Router(nn.Module):
    """A linear router whose published form is `W`, `b`, and which may be trained on standardised inputs.

    The mean of the embeddings has one large component that all inputs share, and what tells inputs apart is small
    beside it: a router on it sends every input to one expert. So `W` and `b` can be *trained* in the coordinates
    `x = (x̄ - mean) / scale`, whose statistics come from training inputs, with logits `pace · (W x + b)`, which slows
    the router down where the optimizer's rate is too high for it. The forward pass always uses `published()`, which
    folds them in, so the result is the same in training and after.

    Tensors: `weight (N, H)`, `bias (N,)` or None, and while training on standardised inputs `mean (H,)`, `scale (H,)`
    and `pace ()`.
    """

    def __init__(self, hidden_size: int, num_experts: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        # Unset outside training: a base may hold thousands of adapters that need none of them.
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)
        self.register_buffer("pace", None)
        self.mean: Tensor | None
        self.scale: Tensor | None
        self.pace: Tensor | None

    def initialise(self, generator: torch.Generator) -> None:
        for parameter in self.parameters():
            fill_as_linear(parameter, self.weight.shape[1], generator)

    @torch.no_grad()
    def standardize(self, means: Tensor, *, learning_rate: float = 0.0, keep: bool = False) -> None:
        """Train in the coordinates of these mean embeddings `(examples, H)`.

        Args:
            means: of training inputs.
            learning_rate: of the training; the router trains at no more than `ROUTER_RATE / H`, whatever it is.
            keep: the function: `W` and `b` are those of a trained router; else they are those of the new coordinates.
        """
        if self.bias is None:
            raise ValueError("a router without a bias has nothing to fold the inputs' mean into")
        self.mean = means.mean(0).to(self.weight)
        deviation = means.std(0, correction=0)
        # A feature that never varies says nothing; dividing by its rounding error would make it decide.
        varies = deviation > 1e-6 * deviation.max()
        self.scale = torch.where(varies, deviation / SPREAD, torch.ones_like(deviation)).to(self.weight)
        highest = ROUTER_RATE / self.weight.shape[1]
        self.pace = self.weight.new_tensor(highest / max(learning_rate, highest))
        if keep:
            self.start(self.weight * self.scale, self.bias + self.weight @ self.mean)
        else:
            self.start(self.weight, self.bias)

    @torch.no_grad()
    def start(self, slope: Tensor, offset: Tensor) -> None:
        """Let the logits be `slope x + offset` of the inputs `x` in the coordinates of training; without a bias there
        is no `offset`."""
        for parameter, value in zip(self.parameters(), (slope, offset), strict=False):
            parameter.copy_(value if self.pace is None else value / self.pace)

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the statistics into `W` and `b`: the same function, bit for bit, in the published coordinates."""
        for parameter, published in zip(self.parameters(), self.published(), strict=True):
            parameter.copy_(published)
        self.mean = self.scale = self.pace = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Weights come with their coordinates, or are published."""
        if f"{prefix}weight" in state_dict:
            # Copied below, because a file's tensors may be unaligned in memory, where sums over them round differently.
            if f"{prefix}mean" in state_dict:
                state_dict.setdefault(f"{prefix}pace", torch.ones(()))  # of an earlier version
            for name, like in (("mean", self.weight[0]), ("scale", self.weight[0]), ("pace", self.weight[0, 0])):
                setattr(self, name, torch.empty_like(like) if f"{prefix}{name}" in state_dict else None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def choose_always(self, expert: int) -> None:
        """Send every input to this expert, with a probability of exactly 1 and gradients of exactly 0."""
        if self.bias is None:
            raise ValueError("a router without a bias cannot prefer one expert whatever it reads")
        one = nn.functional.one_hot(torch.tensor(expert), len(self.bias)).to(self.bias)
        self.start(torch.zeros_like(self.weight), CERTAIN * one)

    @property
    def is_constant(self) -> bool:
        """Whether every input goes to the same expert, whatever it is."""
        return self.bias is not None and not self.weight.any()

    def published(self) -> tuple[Tensor, ...]:
        """`W (N, H)` and, if there is one, `b (N,)`, on the raw mean embedding."""
        if self.bias is None:
            return (self.weight,)
        if self.mean is None or self.scale is None or self.pace is None:
            return self.weight, self.bias
        weight = self.pace * self.weight / self.scale
        return weight, self.pace * self.bias - weight @ self.mean

    def forward(self, mean_embeds: Tensor, noise: float) -> Tensor:
        """`(B, H)` to logits `(B, N)`; `noise` is σ, applied in training only."""
        logits = nn.functional.linear(mean_embeds, *self.published())
        if self.training and noise > 0:
            logits = logits * (1 + noise * torch.randn_like(logits))
        return logits


def gate(probabilities: Tensor, *, selective: bool, probationary: bool, hardness: float = 1.0) -> Tensor:
    """The factor that each expert is multiplied by, `(B, N)`.

    Args:
        probabilities: `(B, N)`.
        selective: keep the most probable expert only.
        probationary: multiply by the router's probability; without it the kept experts count in full, and a selective
            gate passes the gradient straight through to the probabilities.
        hardness: 0 for the soft gate `p`, 1 for the chosen one; in between a mixture, for annealing.
    """
    if not selective:
        return probabilities if probationary else torch.ones_like(probabilities)
    kept = torch.zeros_like(probabilities).scatter(1, probabilities.argmax(1, keepdim=True), 1.0)
    chosen = probabilities * kept if probationary else kept + (probabilities - probabilities.detach())
    return chosen if hardness == 1.0 else torch.lerp(probabilities, chosen, hardness)


class RoutingStatistics:
    """How training inputs were routed since the last `read`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.inputs = 0
        self.chosen: Tensor | float = 0.0  # (N,)
        self.confidence: Tensor | float = 0.0

    @torch.no_grad()
    def observe(self, probabilities: Tensor) -> Tensor:
        """Count a batch `(B, N)` without waiting for the device; returns the sum of its largest probabilities."""
        largest, expert = probabilities.max(1)
        self.inputs += len(probabilities)
        self.chosen = self.chosen + nn.functional.one_hot(expert, probabilities.shape[1]).sum(0)
        total = largest.sum()
        self.confidence = self.confidence + total
        return total

    def read(self) -> dict[str, float | list[float]]:
        """`expert_use` (each expert's share of the inputs) and `routing_confidence` (mean of the largest probability),
        or nothing where nothing was routed; then start again from zero."""
        if not self.inputs:
            return {}
        chosen, confidence = torch.as_tensor(self.chosen), torch.as_tensor(self.confidence)
        values: dict[str, float | list[float]] = {
            "expert_use": [round(share, 4) for share in (chosen / self.inputs).tolist()],
            "routing_confidence": round(float(confidence) / self.inputs, 4),
        }
        self._reset()
        return values


class RoutedConfig(PromptConfig):
    """A soft prompt whose parts a router weights or chooses.

    Attributes:
        num_experts: `N`.
        router_noise: σ of the multiplicative noise on the router's logits, in training only.
        router_init: `"gradient"` starts the router so that inputs whose loss asks for the same change of the prompt
            share an expert; `"random"`, as a linear layer starts.
        router_test: with that start, whether all inputs go to one expert, and the router does not train, unless a
            permutation test finds that the input says anything about the change that its loss asks for. The adapter
            then ends as a single prompt.
        router_standardize: train the router on standardised inputs; folded into `W` and `b` when saved.
        routing_anneal: start with the soft gate and harden it to the chosen one.
        split_after: fraction of the training steps for which the experts are trained as one, before the router starts
            and they part (as sparse upcycling makes experts of a dense model, arXiv:2212.05055).
    """

    routes = reads_input = True
    router_bias: ClassVar[bool] = True
    num_experts: Size = 2
    router_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    router_init: Literal["gradient", "random"] = "random"
    router_test: bool = False
    router_standardize: bool = False
    routing_anneal: bool = False
    split_after: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _what_needs_a_bias_has_one(self) -> Self:
        if self.router_standardize and not self.router_bias:
            raise ValueError(
                f"router_standardize=True: the router of {self.method} has no bias to fold the inputs' mean into when "
                "the adapter is saved: leave it out"
            )
        if self.router_test and not self.router_bias:
            raise ValueError(
                f"router_test=True: the router of {self.method} has no bias to send all inputs to one expert by: "
                "leave it out"
            )
        return self

    def of_callback(self) -> list[str]:
        """The options that are on and that only `RoutingCallback` carries out, as they are written."""
        options = {
            f"router_init={self.router_init!r}": self.router_init == "gradient",
            "router_test=True": self.router_init == "gradient" and self.router_test,
            "router_standardize=True": self.router_standardize,
            "routing_anneal=True": self.routing_anneal,
            f"split_after={self.split_after:g}": self.split_after > 0,
        }
        return [option for option, on in options.items() if on]


class RoutedEncoder(PromptEncoder):
    """An encoder with a router. A subclass creates `router` in its constructor and calls `route` in `forward`.

    Attributes:
        router: its `bias` is None if the config's `router_bias` is False.
        together: whether the experts are trained as one: the gate is 1/N for each, whatever the router says.
        alone: whether one expert trains alone, because the router sends all inputs to it.
        hardness: of the gate in training, from 0 (soft) to 1 (the chosen gate).
        confidence: running mean of the largest probability over training steps.
        of_step: sum of the largest probabilities, and the rows, since the last training step.
        has_callback: whether a `RoutingCallback` trains the router.
        trained: whether the router has been trained or loaded: it is then neither started nor softened again.
    """

    config: RoutedConfig
    router: Router

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.together = self.alone = False
        self.hardness = 1.0
        self.confidence: Tensor | float = 0.0
        self.of_step: tuple[Tensor | float, int] = 0.0, 0
        self.statistics = RoutingStatistics()
        self.has_callback = self.trained = False

    def route(
        self, input_embeds: Tensor, input_mask: Tensor, *, selective: bool = True, probationary: bool = True
    ) -> Routing:
        """How each row is routed, with noise and the annealed gate in training.

        Args:
            input_embeds: `(B, L, H)`.
            input_mask: `(B, L)`, true at the tokens that the router may read.
            selective, probationary: as in `gate`.
        """
        watched = self.has_callback or not torch.is_grad_enabled()  # as in generation
        if self.training and not watched and (options := self.config.of_callback()):
            self.has_callback = True  # warn once
            warnings.warn(
                f"training without ptmoe.RoutingCallback: {', '.join(options)} without effect, and the router may "
                "collapse; give the trainer callbacks=[ptmoe.RoutingCallback()]",
                stacklevel=2,
            )
        probabilities = self.router(mean_input(input_embeds, input_mask), self.config.router_noise).softmax(1)
        hardness = self.hardness if self.training else 1.0
        if self.training and torch.is_grad_enabled():  # what a model in training generates decides nothing of it
            total, rows = self.of_step
            self.of_step = total + self.statistics.observe(probabilities), rows + len(probabilities)
        chosen = gate(probabilities, selective=selective, probationary=probationary, hardness=hardness)
        if self.training and self.together:
            chosen = 0 * probabilities + 1 / probabilities.shape[1]  # every parameter keeps a gradient
        return Routing(chosen, probabilities)

    def mean_prompt(self, rows: int) -> tuple[Prompt, Tensor]:
        """The mean of what the experts make, for each of so many rows, and the leaf `(rows, …)` that holds it."""
        prompts = self.expert_prompts()
        assert prompts is not None
        copies = prompts.detach().mean(0).expand(rows, -1, -1).clone().requires_grad_()  # (rows, T, H)
        return Prompt(copies), copies

    def tensors(self) -> dict[str, Tensor]:
        state = {name: value for name, value in self.state_dict().items() if name not in TRAINING_STATE}
        return state | dict(zip(("router.weight", "router.bias"), self.router.published(), strict=False))

    def end_step(self, total: Tensor, rows: Tensor) -> None:
        """Add a step's mean to the confidence; `total` and `rows` are `of_step`, over all processes."""
        self.confidence = self.confidence + CONFIDENCE_PACE * (total / rows.clamp(min=1) - self.confidence)
        self.of_step = 0.0, 0

    def finish_training(self) -> None:
        """From the coordinates and the soft gate of training to the published form."""
        self.router.fold()
        self.together = self.alone = False
        self.hardness, self.confidence, self.trained = 1.0, 0.0, True

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        self.trained = True

    def training_log(self) -> dict[str, float | list[float]]:
        return {**self.statistics.read(), "hardness": self.hardness}

    def training_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state_dict() | self._progress()
        return {name: value for name, value in state.items() if name.startswith("router.") or name in PROGRESS}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state, strict=False)

    def _progress(self) -> dict[str, Tensor]:
        hardness = torch.tensor(self.hardness, dtype=torch.float64)
        values = hardness, torch.as_tensor(self.confidence), torch.tensor(self.together)
        return dict(zip(PROGRESS, values, strict=True))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Any trainer's checkpoint is this: it has to hold what training has decided so far."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        annealing = self.config.routing_anneal and (self.hardness != 1.0 or isinstance(self.confidence, Tensor))
        if annealing or self.together:
            destination.update({f"{prefix}{name}": value for name, value in self._progress().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if (hardness := state_dict.pop(f"{prefix}hardness", None)) is not None:
            self.hardness = float(hardness)
        if (confidence := state_dict.pop(f"{prefix}confidence", None)) is not None:
            # That of a training without annealing stays the number that it was, which no state holds.
            self.confidence = confidence.to(self.router.weight.device, copy=True) if float(confidence) else 0.0
        self.together = bool(state_dict.pop(f"{prefix}together", False))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
