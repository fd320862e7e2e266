"""PT-MoE (arXiv:2505.09519): a prompt composed for each input from a routed factor and a shared one.

x̄  = mean of E(x_t) over the input's tokens                          (H,)
p  = softmax((W x̄ + b) ⊙ (1 + ε)),  ε ~ N(0, σ²) in training         (N,)
g  = p ⊙ 1[i = argmax p]            selective, probationary          (N,)
P  = (Σ_i g_i A_i) B                A: (N, T, R), B: (R, H)          (T, H)
"""

from typing import Any, Literal

import torch
from pydantic import model_validator
from pydantic.fields import FieldInfo
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.methods.base import InitialEmbeddings, Prompt, Size
from ptmoe.methods.factors import check_rank, random_factors, svd_factors
from ptmoe.methods.routing import RoutedConfig, RoutedEncoder, Router

PAPER_RECIPE = {
    "router_init": "random",
    "router_standardize": False,
    "routing_anneal": False,
    "shared_factor": False,
}


class PTMoEConfig(RoutedConfig):
    """PT-MoE: `N·T·R + R·H + N·(H + 1)` trainable parameters.

    Attributes:
        num_experts: `N`.
        rank: `R`, at most min(T, H).
        selective: keep the most probable expert only.
        probationary: multiply the kept expert by its router probability.
        distinct_experts: start every expert from its own part of one joint SVD, over different tokens of the
            vocabulary; by default all start the same.
        shared_factor: train each expert as `A_i = S + D_i`, whose `S (T, R)` learns from every input; folded into `A`
            when training ends.
        init_text: one text, from which all experts start the same, as in the paper; or one for each expert, and a
            joint SVD.

    The router's options are those of `RoutedConfig`, on but for `split_after`; `recipe="paper"` turns off what the
    paper does not have.
    """

    method = "pt-moe"
    order = 10
    figure_color = ("#0072b2", "#4fa8e0")
    figure_marker = "o"
    free_sizes = ("rank", "num_virtual_tokens")
    shorthands = {
        "recipe": FieldInfo(
            annotation=Literal["default", "paper"], description="routing options: ours, or as published"
        )
    }
    retired = {**RoutedConfig.retired, "top_k": 1, "balance_loss": 0.0}
    rank: Size = 36
    selective: bool = True
    probationary: bool = True
    router_init: Literal["gradient", "random"] = "gradient"
    router_standardize: bool = True
    routing_anneal: bool = True
    distinct_experts: bool = False
    shared_factor: bool = True
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

    @property
    def soft_gate(self) -> bool:
        return not self.selective

    def build(self, hidden_size: int) -> "PTMoE":
        return PTMoE(self, hidden_size)


class PTMoE(RoutedEncoder):
    """Tensors: `A (N, T, R)`, `B (R, H)`, `router.weight (N, H)`, `router.bias (N,)`; while training with
    `shared_factor`, `S (T, R)`, and `A` holds the experts' differences from it."""

    config: PTMoEConfig

    def __init__(self, config: PTMoEConfig, hidden_size: int) -> None:
        super().__init__(config)
        check_rank(config.rank, config.num_virtual_tokens, hidden_size)
        self.A = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, config.rank))
        self.B = nn.Parameter(torch.empty(config.rank, hidden_size))
        self.register_parameter("S", None)
        self.S: nn.Parameter | None
        self.router = Router(hidden_size, config.num_experts)

    def factors(self) -> Tensor:
        """The experts' factors `(N, T, R)`, of the published form."""
        return self.A if self.S is None else self.A + self.S

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        options = {"selective": self.config.selective, "probationary": self.config.probationary}
        routing = self.route(input_embeds, input_mask, **options)
        factor = torch.einsum("bn,ntr->btr", routing.gate, self.factors())
        return Prompt(factor @ self.B, routing)

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
        if self.config.shared_factor:
            self.S = nn.Parameter(torch.zeros_like(self.A[0]))
            self.S.passing = True  # type: ignore[attr-defined]
        self.router.initialise(source.generator)

    def expert_prompts(self) -> Tensor:
        return self.factors() @ self.B

    def tensors(self) -> dict[str, Tensor]:
        published = super().tensors() | {"A": self.factors().detach()}
        published.pop("S", None)
        return published

    @torch.no_grad()
    def finish_training(self) -> None:
        super().finish_training()
        if self.S is not None:
            self.A.copy_(self.factors())
            self.S = None

    def training_state(self) -> dict[str, Tensor]:
        shared = {} if self.S is None else {"A": self.A.detach(), "S": self.S.detach()}
        return super().training_state() | shared

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors if self.S is None else tensors | {"S": torch.zeros_like(self.S)})

    def fixed_prompts(self) -> Tensor | None:
        return self.expert_prompts() if self.config.selective and not self.config.probationary else None
