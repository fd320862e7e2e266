"""What a base forgets: how much worse it predicts, with an adapter, texts that it could predict before.

    forgetting = L(base with the adapter) - L(base)

`L` is the mean cross-entropy per predicted token, in nats, over the same tokens. Of an instructed skill of nano's the
answer is predicted (its inputs are random, and nothing predicts them), and a router reads what stands before it. Of a
line of text every token but the first is predicted, and a router reads the line, as it would read a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.evaluation import batches_within
from ptmoe.fast.loss import IGNORED
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.runs.records import Forgetting
from ptmoe.tasks.base import Example
from ptmoe.tasks.tokens import encode_completion, encode_prompts, row_length

MOST_TOKENS = 512  # of a text; the rest is left out
TOKENS_AT_ONCE = 8192


class Text(NamedTuple):
    """The tokens of a text, how many of them at its beginning are given, and how many of them a router reads."""

    ids: list[int]
    given: int
    read: int


def encode_texts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, positions: int | None, num_virtual_tokens: int
) -> list[Text]:
    """The texts' tokens, as many as the base's positions hold beside the virtual ones; an example without a target is a
    line of text.

    Raises:
        PtmoeError: no text has two tokens.
    """
    length, texts = row_length(positions, num_virtual_tokens, MOST_TOKENS), []
    for example, prompt in encode_prompts(examples, tokenizer):
        assert prompt is not None  # no limit was given
        whole = prompt.ids + (encode_completion(example, tokenizer) if example.target else [])
        given = len(prompt.ids) if example.target else 1
        ids = whole[:length]
        if len(ids) > given:
            texts.append(Text(ids, given, given if example.target else len(ids)))
    if examples and not texts:
        raise PtmoeError("forgetting: no line has two tokens, so none is there to predict: give lines of text")
    return sorted(texts, key=lambda text: -len(text.ids))


@torch.no_grad()
def text_loss(model: PromptedCausalLM, texts: Sequence[Text]) -> float:
    """The mean cross-entropy per predicted token, in nats, with the active adapter."""
    total, was_training = 0.0, model.training
    model.eval()
    try:
        for batch in batches_within(texts, [len(text.ids) for text in texts], TOKENS_AT_ONCE):
            ids = pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True)  # (B, L)
            place = torch.arange(ids.shape[1])
            counts = [(len(text.ids), text.given, text.read) for text in batch]
            lengths, given, read = (column[:, None] for column in torch.tensor(counts).unbind(1))
            labels = ids.masked_fill((place < given) | (place >= lengths), IGNORED)
            rows = [ids, place < lengths, labels, place < read]
            ids, mask, labels, readable = (tensor.to(model.device) for tensor in rows)
            out = model(ids, mask.long(), labels, input_mask=readable, num_items_in_batch=1, skip_logits=True)
            total += float(out.loss)
    finally:
        model.train(was_training)
    return total / predicted(texts)


def predicted(texts: Sequence[Text]) -> int:
    """How many tokens are predicted."""
    return sum(len(text.ids) - text.given for text in texts)


def forgetting(model: PromptedCausalLM, texts: Sequence[Text], base_loss: float | None = None) -> Forgetting:
    """Of the active adapter.

    Args:
        base_loss: what `text_loss` was before the training; by default it is computed with the adapter disabled, which
            a method that trains the base's own weights cannot be.
    """
    if base_loss is None:
        with model.disable_adapter():
            base_loss = text_loss(model, texts)
    return Forgetting(texts=len(texts), tokens=predicted(texts), base_loss=base_loss, loss=text_loss(model, texts))
