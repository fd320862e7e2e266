"""What both engines on vLLM ask of it: how tokens are chosen, and whether it takes embeddings as the tokens they stand
for."""

from collections.abc import Sequence
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from ptmoe.serve.engine import Sampling, Token

PROBED = 8  # tokens
AGREEMENT = 0.1  # nats between the two ways of asking, in half precision; of a spread below a nat, its tenth
TRIED = Sampling(1, logprobs=5)


def parameters(sampling: Sampling) -> dict[str, Any]:
    """vLLM's names. Everything is said, because its defaults come from the base's generation config."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(sampling.ends),
        **({} if sampling.seed is None else {"seed": sampling.seed % 2**63}),
        **({} if sampling.logprobs is None else {"logprobs": sampling.logprobs}),
    }


@torch.no_grad()
def probe(embedding: nn.Module) -> tuple[list[int], Tensor]:
    """A few tokens, and their embeddings `(L, H)`."""
    vocabulary = len(cast(Tensor, embedding.weight))
    ids = torch.arange(1, PROBED + 1) * (vocabulary // (PROBED + 2))
    return ids.tolist(), embedding(ids[None])[0]


def agree(of_ids: Sequence[Token], of_embeds: Sequence[Token]) -> bool:
    """Whether what is expected after ids, as `TRIED` asks, is expected after their embeddings."""
    if not of_ids or not of_embeds:
        return False
    own, ours = dict(of_ids[0].top), dict(of_embeds[0].top)
    common = own.keys() & ours.keys()
    if 2 * len(common) <= len(own):
        return False
    # A small base may expect all tokens almost alike, whatever it is given.
    spread = min(1.0, max(own.values()) - min(own.values()))
    return median(abs(own[token] - ours[token]) for token in common) <= AGREEMENT * spread
