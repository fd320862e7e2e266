"""Attention on a CUDA device without cuDNN's.

`torch` prefers it on some GPUs, and it builds a plan for every batch shape that it has not seen, forward and backward:
tenths of a second, where a step of a small base takes hundredths (github.com/modelscope/FunASR/issues/3704 profiles
it). The rows of a data set have many lengths, so nearly every step would wait for one. torch's other kernels need no
plans. A process whose batches all have one shape loses a little by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_obstacle(base: PreTrainedModel) -> str | None:
    """Why cuDNN's attention is not left out; None where it is."""
    if base.device.type != "cuda":
        return "the base is not on a CUDA device"
    if base.is_activation_checkpointing:  # they would be computed with another kernel than the first time
        return "layers are computed again in the backward pass"
    return None


@contextmanager
def without_plans(base: PreTrainedModel) -> Iterator[None]:
    """Within it `base` computes its attention with kernels that need no plan. The switch is the process's."""
    on = attention_obstacle(base) is None and torch.backends.cuda.cudnn_sdp_enabled()
    if on:
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if on:
            torch.backends.cuda.enable_cudnn_sdp(True)
