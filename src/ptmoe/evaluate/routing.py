"""The routing of many inputs: which expert each domain goes to, how evenly experts are used, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from ptmoe.runs.records import RoutingSummary
from ptmoe.tasks.tokens import encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.methods.base import PromptEncoder
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.base import Example


def summarise_routing(
    gates: Sequence[Sequence[float] | None],
    domains: Sequence[str],
    *,
    similarity: list[list[float]] | None = None,
    soft_gate: bool = False,
) -> RoutingSummary | None:
    """Use, entropy and mutual information of a task's routing; None where nothing was routed.

    Args:
        gates: each input's gate over the `N` experts.
        domains: each input's domain.
        similarity: `(N, N)`, cosines of the expert prompts.
        soft_gate: whether the gate mixes all experts.
    """
    if not gates or gates[0] is None:
        return None
    gate = np.asarray(gates, dtype=float)  # (inputs, N)
    chosen = gate.argmax(1)
    experts = gate.shape[1]
    names = sorted(set(domains))
    joint = np.zeros((len(names), experts))
    for domain, expert in zip(domains, chosen, strict=True):
        joint[names.index(domain), expert] += 1
    share = joint / joint.sum()
    return RoutingSummary(
        num_experts=experts,
        use={name: (row / row.sum()).tolist() for name, row in zip(names, joint, strict=True)},
        mean_gate={name: gate[[domain == name for domain in domains]].mean(0).tolist() for name in names},
        entropy=_entropy(share.sum(0)),
        mutual_information=_entropy(share.sum(0)) + _entropy(share.sum(1)) - _entropy(share.ravel()),
        prompt_similarity=similarity,
        soft_gate=soft_gate,
    )


def _entropy(distribution: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    present = distribution[distribution > 0]
    return float(-(present * np.log(present)).sum())


def route_examples(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 256,
    *,
    chat: bool = False,
) -> list[list[float] | None]:
    """Each example's gate over the experts, without generating; None for a method that does not route."""
    gates: list[list[float] | None] = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        rows = [prompt.ids for example in chunk if (prompt := encode_prompt(example, tokenizer, chat=chat))]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
        routing = model.route(ids, mask)
        gates += [None] * len(rows) if routing is None else routing.gate.tolist()
    return gates


@torch.no_grad()
def expert_similarity(encoder: PromptEncoder) -> list[list[float]] | None:
    """Cosine of every pair of expert prompts, flattened to `T·H`; None for a method without experts."""
    prompts = encoder.expert_prompts()
    if prompts is None:
        return None
    flat = F.normalize(prompts.flatten(1), dim=1)
    return [[float(f"{value:.6f}") for value in row] for row in (flat @ flat.T).tolist()]
