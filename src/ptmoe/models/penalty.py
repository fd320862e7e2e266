"""The repetition penalty of a padded batch.

`transformers` leaves out as many tokens of each row as its mask has padding on the left. Ours is the mask of the prompt
and the tokens, in which shorter prompts are padded as well and a cached one stands before the padding, while the token
ids have no prompt, and padding on either side.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import RepetitionPenaltyLogitsProcessor


def of_real_tokens(penalty: float, attention_mask: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of `generate` with this penalty on each row's real and new tokens, before other processors given.

    Args:
        penalty: 1 for none.
        attention_mask: `(B, L)`, of the token ids.
        options: of `generate`.
    """
    if penalty == 1:
        return options
    processor = RepetitionPenaltyLogitsProcessor(float(penalty))

    def penalised(input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids.shape[1] - attention_mask.shape[1]
        padding = nn.functional.pad(~attention_mask.bool(), (0, new))
        padding = padding.repeat_interleave(len(input_ids) // len(padding), 0)  # of each row's beams
        ids = input_ids.masked_fill(padding, scores.shape[1])  # no token's: it is left out
        return cast(Tensor, processor(ids, scores))

    others = options.get("logits_processor") or []
    return options | {"repetition_penalty": 1.0, "logits_processor": [penalised, *others]}
