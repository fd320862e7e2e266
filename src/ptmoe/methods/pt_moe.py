"""PT-MoE (arXiv:2505.09519): a prompt composed for each input from a routed factor and a shared one.

x̄  = mean of E(x_t) over the input's tokens                          (H,)
p  = softmax((W x̄ + b) ⊙ (1 + ε)),  ε ~ N(0, σ²) in training         (N,)
g  = p ⊙ 1[i = argmax p]            selective, probationary          (N,)
P  = (Σ_i g_i A_i) B                A: (N, T, R), B: (R, H)          (T, H)

With `frozen_projection`, which the paper does not have, B is the frozen random matrix of ULPT (arXiv:2502.04501), and
P  = ((Σ_i g_i A_i) B) ⊙ s + b      s, b: (H,), trained              (T, H)
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from torch import Tensor, nn
from typing_extensions import Self

from ptmoe.methods.base import InitialEmbeddings, Prompt, Size
from ptmoe.methods.experts import Experts
from ptmoe.methods.factors import (
    check_projection,
    check_rank,
    projected,
    random_factors,
    random_projection,
    svd_factors,
)
from ptmoe.methods.routing import RoutedConfig, Router

PAPER_RECIPE = {
    "router_init": "random",
    "router_test": False,
    "router_standardize": False,
    "routing_anneal": False,
    "shared_factor": False,
}


class PTMoEConfig(RoutedConfig):
    """PT-MoE: `N·T·R + R·H + N·(H + 1)` trainable parameters; `N·T·R + 2·H + N·(H + 1)` with `frozen_projection`.

    Attributes:
        num_experts: `N`.
        rank: `R`, at most min(T, H), or H with `frozen_projection`.
        selective: keep the most probable expert only.
        probationary: multiply the kept expert by its router probability.
        distinct_experts: start every expert from its own part of one joint SVD, over different tokens of the
            vocabulary; by default all start the same.
        shared_factor: train each expert as `A_i = S + D_i`, whose `S (T, R)` learns from every input; folded into `A`
            when training ends.
        frozen_projection: B is random and does not train, a scale and a shift of the prompt do.
        projection_seed: decides that B, which is not saved.
        init_text: one text, from which all experts start the same, as in the paper; or one for each expert, and a
            joint SVD.

    The router's options are those of `RoutedConfig`, on but for `split_after`; `recipe="paper"` turns off what the
    paper does not have.
    """

    method = "pt-moe"
    order = 10
    default_learning_rate = 0.1
    narrow_learning_rate = 0.03
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
    router_test: bool = True
    router_standardize: bool = True
    routing_anneal: bool = True
    distinct_experts: bool = False
    shared_factor: bool = True
    frozen_projection: bool = False
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
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


class PTMoE(Experts):
    """Tensors: `A (N, T, R)`, `B (R, H)`, `router.weight (N, H)`, `router.bias (N,)`; with `frozen_projection` `scale`
    and `shift (H,)` in B's place; while training with `shared_factor`, `S (T, R)`, and `A` holds the experts'
    differences from it."""

    config: PTMoEConfig

    def __init__(self, config: PTMoEConfig, hidden_size: int) -> None:
        super().__init__(config)
        if config.frozen_projection:
            check_projection(config.rank, hidden_size)
        else:
            check_rank(config.rank, config.num_virtual_tokens, hidden_size)
        self.A = nn.Parameter(torch.empty(config.num_experts, config.num_virtual_tokens, config.rank))
        self.B: Tensor
        if config.frozen_projection:
            self.register_buffer("B", torch.empty(config.rank, hidden_size), persistent=False)
            self.scale, self.shift = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        else:
            self.B = nn.Parameter(torch.empty(config.rank, hidden_size))
        self.register_parameter("S", None)
        self.router = Router(hidden_size, config.num_experts)

    def project(self, factors: Tensor) -> Tensor:
        """`(…, T, R)` to prompts `(…, T, H)`."""
        prompts = factors @ self.B
        return prompts * self.scale + self.shift if self.config.frozen_projection else prompts

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        options = {"selective": self.config.selective, "probationary": self.config.probationary}
        routing = self.route(input_embeds, input_mask, **options)
        factor = torch.einsum("bn,ntr->btr", routing.gate, self.whole("A"))
        return Prompt(self.project(factor), routing)

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        experts, tokens, rank = self.A.shape
        config, frozen = self.config, self.config.frozen_projection
        # One text gives every expert the same start.
        distinct = config.init == "random" or (config.distinct_experts and config.init != "text")
        if isinstance(config.init_text, list):
            rows = torch.cat([source.text(text, tokens) for text in config.init_text])  # (N·T, H)
        elif frozen or config.init != "random":
            rows = source.rows(config, experts * tokens if distinct else tokens)
        if frozen:
            b = random_projection(config.projection_seed, *self.B.shape)
            a, shift = projected(rows, b)
            self.scale.fill_(1)
            self.shift.copy_(shift)
        elif config.init == "random":
            a, b = random_factors(source, config, (experts, tokens), rank, self.B.shape[1])
        else:
            a, b = svd_factors(rows, rank)
        self.A.copy_(a.reshape(-1, tokens, rank))
        self.B.copy_(b)
        if self.config.shared_factor:
            self.share()
        self.router.initialise(source.generator)

    def expert_prompts(self) -> Tensor:
        return self.project(self.whole("A"))

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if self.config.frozen_projection:
            self.B.copy_(random_projection(self.config.projection_seed, *self.B.shape))

    def fixed_prompts(self) -> Tensor | None:
        return self.expert_prompts() if self.config.selective and not self.config.probationary else None
