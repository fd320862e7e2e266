"""The words of a base's vocabulary nearest to a soft prompt's virtual tokens."""

from typing import cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ptmoe.errors import PtmoeError
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.runs.records import NearestWords

ROWS = 16_384  # of the embedding at once, so that a large vocabulary is never copied as a whole


@torch.no_grad()
def nearest_words(model: PromptedCausalLM, tokenizer: PreTrainedTokenizerBase, k: int = 3) -> NearestWords:
    """The `k` nearest words of each virtual token of each expert's prompt, or of the only prompt."""
    encoder = model.encoder
    embedding = cast(torch.Tensor, model.get_input_embeddings().weight)  # (V, H)
    prompts = encoder.expert_prompts()  # (N, T, H)
    if prompts is None and encoder.config.reads_input:  # there is one for each input
        return NearestWords(experts=[])
    if prompts is None:
        nothing = torch.zeros(1, 1, embedding.shape[1], device=embedding.device)
        prompts = encoder(nothing, torch.ones_like(nothing[..., 0]).bool()).embeds
    if not prompts.shape[1]:
        return NearestWords(experts=[])
    return NearestWords(experts=[nearest_tokens(prompt, embedding, tokenizer, k) for prompt in prompts])


@torch.no_grad()
def nearest_tokens(
    prompt: torch.Tensor, embedding: torch.Tensor, tokenizer: PreTrainedTokenizerBase, k: int = 5
) -> list[list[tuple[str, float]]]:
    """The `k` tokens of the vocabulary with the highest cosine to each virtual token, the nearest first.

    Args:
        prompt: `(T, H)`.
        embedding: the base's input embedding, `(V, H)`, in any dtype.
        tokenizer: the base's; it may have fewer tokens than the embedding has rows.
        k: at least 1.

    Returns:
        For each virtual token, `k` pairs of a token's text and its cosine.

    Raises:
        PtmoeError: shapes that do not fit each other, or a `k` that the vocabulary has no room for.
    """
    if prompt.ndim != 2 or embedding.ndim != 2 or prompt.shape[1] != embedding.shape[1]:
        raise PtmoeError(
            f"a prompt {tuple(prompt.shape)} beside an embedding {tuple(embedding.shape)}: needs (T, H) and (V, H)"
        )
    words = min(len(embedding), len(tokenizer))
    if not 1 <= k <= words:
        raise PtmoeError(f"k={k}: needs at least 1 and at most the vocabulary's {words:,} tokens")
    virtual = F.normalize(prompt.float().to(embedding.device), dim=1)  # (T, H)
    cosines = virtual.new_empty(len(prompt), 0)
    ids = cosines.long()
    for start in range(0, words, ROWS):
        part = F.normalize(embedding[start : min(start + ROWS, words)].float(), dim=1)
        here = torch.arange(start, start + len(part), device=ids.device).expand(len(prompt), -1)
        cosines, places = torch.cat([cosines, virtual @ part.T], dim=1).topk(min(k, cosines.shape[1] + len(part)))
        ids = torch.cat([ids, here], dim=1).gather(1, places)
    return [
        [(_word(tokenizer, token), round(cosine, 6)) for token, cosine in zip(*row, strict=True)]
        for row in zip(ids.tolist(), cosines.tolist(), strict=True)
    ]


def _word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text, or its name in the vocabulary if it is only part of a character."""
    word = str(tokenizer.decode([token]))
    return word if word and "\N{REPLACEMENT CHARACTER}" not in word else str(tokenizer.convert_ids_to_tokens(token))
