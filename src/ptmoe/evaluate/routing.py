"""The routing of many inputs: which expert each domain goes to, how evenly experts are used, and how alike they are."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import entr
from transformers import PreTrainedTokenizerBase

from ptmoe.methods.base import PromptEncoder, Routing
from ptmoe.methods.routing import RoutedEncoder
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.runs.records import RoutingSummary
from ptmoe.tasks.base import Example
from ptmoe.tasks.tokens import encode_prompts


def summarise_routing(
    gates: Sequence[Sequence[float] | None],
    domains: Sequence[str],
    *,
    similarity: list[list[float]] | None = None,
    soft_gate: bool = False,
    one_expert: bool = False,
) -> RoutingSummary | None:
    """Use, entropy and mutual information of a task's routing; None if nothing was routed.

    Args:
        gates: each input's gate over the `N` experts; None for an input that was not routed, which is not counted.
        domains: each input's domain.
        similarity: `(N, N)`, cosines of the expert prompts.
        soft_gate: whether the gate mixes all experts.
        one_expert: whether the router, whatever it reads, chooses the same one.
    """
    routed = [(gate, domain) for gate, domain in zip(gates, domains, strict=True) if gate is not None]
    if not routed:
        return None
    gate = np.array([gate for gate, _ in routed], dtype=float)  # (inputs, N)
    names, domain = np.unique([domain for _, domain in routed], return_inverse=True)
    counts = np.zeros((len(names), gate.shape[1]))
    np.add.at(counts, (domain, gate.argmax(1)), 1)
    share = counts / len(gate)  # of each domain and expert in all inputs
    entropy = float(entr(share.sum(0)).sum())
    return RoutingSummary(
        num_experts=gate.shape[1],
        use={str(name): (row / row.sum()).tolist() for name, row in zip(names, counts, strict=True)},
        mean_gate={str(name): gate[domain == index].mean(0).tolist() for index, name in enumerate(names)},
        entropy=entropy,
        mutual_information=entropy + float(entr(share.sum(1)).sum() - entr(share).sum()),
        prompt_similarity=similarity,
        soft_gate=soft_gate,
        one_expert=one_expert,
    )


def route_examples(
    model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, chat: bool = False
) -> list[list[float] | None]:
    """Each example's gate over the experts, without generating; None for a method that does not route."""
    prompts = encode_prompts(examples, tokenizer, chat=chat)
    routings = [route(model, prompt.ids) for _, prompt in prompts if prompt is not None]
    return [None if routing is None else routing.gate[0].tolist() for routing in routings]


def route(model: PromptedCausalLM, ids: list[int]) -> Routing | None:
    """How a row of tokens is routed alone: the same bits whatever batch it is decoded in."""
    return model.route(torch.tensor([ids], device=model.device)) if model.num_virtual_tokens else None


def has_one_expert(encoder: PromptEncoder) -> bool:
    """Whether it has a router that chooses the same expert whatever it reads."""
    return isinstance(encoder, RoutedEncoder) and encoder.router.is_constant


@torch.no_grad()
def expert_similarity(encoder: PromptEncoder) -> list[list[float]] | None:
    """Cosine of every two expert prompts, flattened to `T·H`; None for a method without experts."""
    prompts = encoder.expert_prompts()
    if prompts is None:
        return None
    flat = F.normalize(prompts.flatten(1), dim=1)
    return [[float(f"{value:.6f}") for value in row] for row in (flat @ flat.T).tolist()]
