"""PT-MoE (arXiv:2505.09519): a prompt composed for each input from a routed factor and a shared one.

x̄  = mean of E(x_t) over the input's tokens                          (H,)
p  = softmax((W x̄ + b) ⊙ (1 + ε)),  ε ~ N(0, σ²) in training         (N,)
g  = p ⊙ 1[i = argmax p]            selective, probationary          (N,)
P  = (Σ_i g_i A_i) B                A: (N, T, R), B: (R, H)          (T, H)
"""

import warnings
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder, Size, mean_input
from ptmoe.methods.factors import check_rank, random_factors, svd_factors
from ptmoe.methods.routing import Router, RoutingStatistics, imbalance, route

CONFIDENCE_PACE = 0.05
PAPER_RECIPE = {
    "router_init": "random",
    "router_standardize": False,
    "routing_anneal": False,
    "distinct_experts": False,
}


class PTMoEConfig(PromptConfig):
    """PT-MoE: `N·T·R + R·H + N·(H + 1)` trained numbers.

    Attributes:
        num_experts: `N`.
        rank: `R`, at most min(T, H).
        selective: keep the highest-weight expert only.
        probationary: multiply the kept expert by its router weight.
        top_k: with `selective`, keep so many; 1 as published.
        balance_loss: weight of a loss that is lowest where a batch uses all experts alike (`routing.imbalance`); 0 as
            published.
        router_noise: σ of the multiplicative noise on the router's logits, in training only.
        router_init: `"gradient"` starts the router so that inputs which want the prompt to change in the same direction
            share an expert; `"random"`, as a linear layer starts.
        router_standardize: train the router on standardised inputs; folded into `W` and `b` when saved.
        routing_anneal: start with the soft gate and harden it to the chosen one.
        distinct_experts: start every expert from its own part of one joint SVD, of other tokens of the vocabulary; off,
            all start the same.
        init_text: one text, from which all experts start the same, as in the paper; or one for each expert, and a
            joint SVD.

    `recipe="paper"` sets the options that the paper does not have to off.
    """

    method: ClassVar[str] = "pt-moe"
    shorthands: ClassVar[dict[str, FieldInfo]] = {
        "recipe": FieldInfo(
            annotation=Literal["default", "paper"],
            description="routing options: ours, or as published",
        )
    }
    num_experts: Size = 2
    rank: Size = 36
    selective: bool = True
    probationary: bool = True
    top_k: Size = 1
    balance_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    router_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    router_init: Literal["gradient", "random"] = "gradient"
    router_standardize: bool = True
    routing_anneal: bool = True
    distinct_experts: bool = True
    init_text: str | list[str] | None = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _recipe(cls, values: Any) -> Any:
        if isinstance(values, dict) and "recipe" in values:
            values = dict(values)
            recipe = values.pop("recipe")
            if recipe == "paper":
                values = {**PAPER_RECIPE, **values}
            elif recipe != "default":
                raise ValueError(f"recipe={recipe!r}: needs 'default' or 'paper'")
        return values

    @model_validator(mode="after")
    def _one_text_for_each_expert(self) -> Self:
        if isinstance(self.init_text, list) and len(self.init_text) != self.num_experts:
            raise ValueError(
                f"init_text has {len(self.init_text)} texts for num_experts={self.num_experts}: "
                "give one text, or one for each expert"
            )
        return self

    @model_validator(mode="after")
    def _kept_experts_are_there(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}: lower top_k")
        if self.top_k > 1 and not self.selective:
            raise ValueError(f"top_k={self.top_k} without selective, which keeps all experts: leave one of them out")
        return self

    @property
    def needs_guidance(self) -> bool:
        """Whether an option is on that a `RoutingCallback` carries out."""
        return self.router_init == "gradient" or self.router_standardize or self.routing_anneal

    def build(self, hidden_size: int) -> "PTMoE":
        return PTMoE(self, hidden_size)


class PTMoE(PromptEncoder):
    config: PTMoEConfig

    def __init__(self, config: PTMoEConfig, hidden_size: int) -> None:
        super().__init__()
        check_rank(config.rank, config.num_virtual_tokens, hidden_size)
        self.config = config
        self.A = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, config.rank))
        self.B = nn.Parameter(torch.empty(config.rank, hidden_size))
        self.router = Router(hidden_size, config.num_experts)
        self.hardness = 1.0  # of the gate in training; 1 is the chosen gate
        self.confidence: Tensor | float = 0.0  # running mean of the largest probability, over training steps
        self.statistics = RoutingStatistics()
        self.guided = False  # by a RoutingCallback

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        if self.training and not self.guided and self.config.needs_guidance:
            self.guided = True  # say it once
            warnings.warn(
                "training without ptmoe.RoutingCallback: the router is trained as recipe='paper' has it, and may "
                "collapse; give the trainer callbacks=[ptmoe.RoutingCallback()]",
                stacklevel=2,
            )
        logits = self.router(mean_input(input_embeds, input_mask), self.config.router_noise)
        routing = route(
            logits,
            selective=self.config.selective,
            probationary=self.config.probationary,
            hardness=self.hardness if self.training else 1.0,
            top_k=self.config.top_k,
        )
        balance = None
        if self.training and self.config.balance_loss:
            balance = self.config.balance_loss * imbalance(routing.probabilities, self.config.top_k)
        if self.training:
            self.statistics.observe(routing.probabilities)
            with torch.no_grad():
                confidence = routing.probabilities.max(1).values.mean()
                self.confidence = self.confidence + CONFIDENCE_PACE * (confidence - self.confidence)
        factor = torch.einsum("bn,ntr->btr", routing.gate, self.A)
        return Prompt(factor @ self.B, routing, auxiliary_loss=balance)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        experts, tokens, rank = self.A.shape
        if self.config.init == "random":
            a, b = random_factors(source, self.config, (experts, tokens), rank, self.B.shape[1])
        elif isinstance(self.config.init_text, list):
            joint = torch.cat([source.text(text, tokens) for text in self.config.init_text])  # (N·T, H)
            a, b = svd_factors(joint, rank)
        elif self.config.distinct_experts and self.config.init != "text":  # one text gives every expert the same start
            a, b = svd_factors(source.rows(self.config, experts * tokens), rank)
        else:
            a, b = svd_factors(source.rows(self.config, tokens), rank)
            a = a.expand(experts, -1, -1)
        self.A.copy_(a.reshape(experts, tokens, rank))
        self.B.copy_(b)
        self.router.initialise(source.generator)

    def training_log(self) -> dict[str, float | list[float]]:
        return {**self.statistics.read(), "hardness": self.hardness}

    def finish_training(self) -> None:
        """From training's coordinates and soft gate to the published form."""
        self.router.fold()
        self.hardness = 1.0

    def training_state(self) -> dict[str, Tensor]:
        mean, scale = self.router.mean, self.router.scale
        statistics = {} if mean is None or scale is None else {"mean": mean, "scale": scale}
        assert self.router.bias is not None
        return {
            "router.weight": self.router.weight,
            "router.bias": self.router.bias,
            **statistics,
            "hardness": torch.tensor(self.hardness, dtype=torch.float64),
            "confidence": torch.as_tensor(self.confidence),
        }

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        assert self.router.bias is not None
        with torch.no_grad():
            self.router.weight.copy_(state["router.weight"])
            self.router.bias.copy_(state["router.bias"])
            if "mean" in state:
                # Copies: a file's tensors lie anywhere in memory, and sums over them round by where they lie.
                self.router.mean = state["mean"].to(self.router.weight, copy=True)
                self.router.scale = state["scale"].to(self.router.weight, copy=True)
            self.confidence = state["confidence"].clone()
        self.hardness = float(state["hardness"])

    def expert_prompts(self) -> Tensor:
        return self.A @ self.B

    def fixed_prompts(self) -> Tensor | None:
        takes_one = self.config.selective and not self.config.probationary and self.config.top_k == 1
        return self.expert_prompts() if takes_one else None

    def tensors(self) -> dict[str, Tensor]:
        weight, bias = self.router.published()
        assert bias is not None
        return {"A": self.A, "B": self.B, "router.weight": weight, "router.bias": bias}
