"""Routing: from the mean input embedding to a gate over the experts.

ℓ  = W x̄ + b                       W: (N, H), b: (N,)
ℓ' = ℓ ⊙ (1 + ε),  ε ~ N(0, σ²)     in training only
p  = softmax(ℓ')
g  = p ⊙ 1[i = argmax p]            selective, probationary
"""

import torch
from torch import Tensor, nn

from ptmoe.methods.base import Routing

# The standard deviation of a standardised input. An adaptive optimizer moves every number at the same pace whatever its
# gradient, so inputs below 1 let the router decide more slowly than the experts learn: at 1 it commits before they
# differ, and two kinds of input end up with one expert; at 1/6 it has not decided in time (docs/findings.md).
SPREAD = 1 / 3


class Router(nn.Module):
    """A linear router whose published form is `W`, `b`, and which may be trained on standardised inputs.

    The mean of the embeddings has one large part that all inputs share, beside which what tells inputs apart is small:
    a router on it sends every input to one expert. So `W` and `b` can be *trained* in the coordinates `(x̄ - mean) /
    scale`, whose statistics come from training inputs. `published()` folds them in, and is what the forward pass uses
    always, so there is one path and one result, in training and after.
    """

    def __init__(self, hidden_size: int, num_experts: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        # (H,) each in training on standardised inputs; a base may hold thousands of adapters that need neither.
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self.mean: Tensor | None
        self.scale: Tensor | None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """As `torch.nn.Linear` starts, but from the given generator."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))

    @torch.no_grad()
    def standardize(self, means: Tensor) -> None:
        """Train in the coordinates of these mean embeddings `(examples, H)`; the router's output changes with it."""
        self.mean = means.mean(0).to(self.weight)
        deviation = means.std(0, correction=0)
        # A feature that never varies tells nothing; dividing by its rounding error would make it decide.
        varies = deviation > 1e-6 * deviation.max()
        self.scale = torch.where(varies, deviation / SPREAD, torch.ones_like(deviation)).to(self.weight)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the statistics into `W` and `b`: the same function, bit for bit, in the published coordinates."""
        weight, bias = self.published()
        self.weight.copy_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        self.mean = self.scale = None

    def published(self) -> tuple[Tensor, Tensor | None]:
        """`W (N, H)` and `b (N,)` on the raw mean embedding."""
        if self.mean is None or self.scale is None:
            return self.weight, self.bias
        weight = self.weight / self.scale
        return weight, None if self.bias is None else self.bias - weight @ self.mean

    def forward(self, mean_embeds: Tensor, noise: float) -> Tensor:
        """`(B, H)` to logits `(B, N)`; `noise` is σ, applied in training only."""
        logits = nn.functional.linear(mean_embeds, *self.published())
        if self.training and noise > 0:
            logits = logits * (1 + noise * torch.randn_like(logits))
        return logits


class RoutingStatistics:
    """How the inputs of training were routed since it was last read."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.inputs = 0
        self.chosen: Tensor | float = 0.0  # (N,)
        self.confidence: Tensor | float = 0.0

    @torch.no_grad()
    def observe(self, probabilities: Tensor) -> None:
        """Count a batch `(B, N)`; nothing waits for the device."""
        largest, expert = probabilities.max(1)
        self.inputs += len(probabilities)
        self.chosen = self.chosen + nn.functional.one_hot(expert, probabilities.shape[1]).sum(0)
        self.confidence = self.confidence + largest.sum()

    def read(self) -> dict[str, float | list[float]]:
        """`expert_use` (each expert's share of the inputs) and `routing_confidence` (mean of the largest probability);
        nothing where nothing was routed. Starts anew."""
        if not self.inputs:
            return {}
        chosen, confidence = torch.as_tensor(self.chosen), torch.as_tensor(self.confidence)
        said: dict[str, float | list[float]] = {
            "expert_use": [round(share, 4) for share in (chosen / self.inputs).tolist()],
            "routing_confidence": round(float(confidence) / self.inputs, 4),
        }
        self._start()
        return said


def gate(
    probabilities: Tensor, *, selective: bool, probationary: bool, hardness: float = 1.0, top_k: int = 1
) -> Tensor:
    """What each expert's factor is multiplied by: `(B, N)`.

    Args:
        probabilities: `(B, N)`.
        selective: keep the `top_k` most probable experts only.
        probationary: multiply by the router's probability; without it kept experts count as they are, and a selective
            gate passes the gradient straight through to the probabilities.
        hardness: 0 for the soft gate `p`, 1 for the chosen one; between them a mixture, for annealing.
        top_k: 1 as published.
    """
    if not selective:
        return probabilities if probationary else torch.ones_like(probabilities)
    kept = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=1).indices, 1.0)
    chosen = probabilities * kept if probationary else kept + (probabilities - probabilities.detach())
    return chosen if hardness == 1.0 else torch.lerp(probabilities, chosen, hardness)


def imbalance(probabilities: Tensor, top_k: int = 1) -> Tensor:
    """How unevenly a batch uses the experts: `N Σ_i f_i p̄_i`, as in Switch Transformers (arXiv:2101.03961, eq. 4).

    `f_i` is the share of the kept places that expert `i` has, `p̄_i` the mean of its probability, through which the
    gradient goes. 1 where all are used alike, `N` where one takes all.

    Args:
        probabilities: `(B, N)`.
        top_k: experts kept for each input.
    """
    experts = probabilities.shape[1]
    kept = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=1).indices, 1.0)
    return experts * (kept.mean(0) / top_k * probabilities.mean(0)).sum()


def route(
    logits: Tensor,
    *,
    selective: bool,
    probationary: bool,
    hardness: float = 1.0,
    top_k: int = 1,
) -> Routing:
    """From the router's logits `(B, N)` to the gate."""
    probabilities = logits.softmax(1)
    chosen = gate(probabilities, selective=selective, probationary=probationary, hardness=hardness, top_k=top_k)
    return Routing(chosen, probabilities)
