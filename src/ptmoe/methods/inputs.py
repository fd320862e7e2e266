"""What a router reads of a batch."""

import torch
from torch import Tensor


def mean_input(input_embeds: Tensor, input_mask: Tensor) -> Tensor:
    """The mean embedding `(B, H)`, float32, of each row's input tokens.

    The real tokens are packed before they are summed, so each row sums the same numbers in the same order whatever the
    padding, the batch or the answer: the routing is the same to the bit. The base is frozen, so no gradient is kept.

    Raises:
        ValueError: a row without input tokens.
    """
    with torch.no_grad():
        lengths = input_lengths(input_mask)
        packed = input_embeds[input_mask].float()  # (tokens, H)
        return torch.segment_reduce(packed, "sum", lengths=lengths, axis=0, unsafe=True) / lengths[:, None]


def input_lengths(input_mask: Tensor) -> Tensor:
    """`(B,)`, how many tokens of each row may decide its prompt.

    Raises:
        ValueError: a row without input tokens.
    """
    lengths = input_mask.sum(1)
    if (lengths == 0).any():
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"rows {rows} have no input token for the router to read: every real token is supervised or padding. "
            "Set the labels of the prompt's tokens to -100, or pass input_mask"
        )
    return lengths
