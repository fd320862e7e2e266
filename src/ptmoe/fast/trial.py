"""Trying a base out without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Within it all parts of `base` are in evaluation mode, without gradients; it leaves modes, buffers and the random
    state as they were."""
    training = [module for module in base.modules() if module.training]
    buffers = {buffer: buffer.clone() for buffer in base.buffers() if buffer.device.type != "meta"}
    devices = {buffer.device for buffer in (*buffers, *base.parameters()) if buffer.device.type == "cuda"}
    for module in training:
        module.training = False
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for buffer, before in buffers.items():
            if not torch.equal(buffer, before):
                buffer.copy_(before)
