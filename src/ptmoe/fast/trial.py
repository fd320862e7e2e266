"""Trying a base out, and putting something else in the place of its parts, without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def standing_in(module: nn.Module, **substitutes: Any) -> Iterator[None]:
    """Within it these attributes stand for the module's own, which may be substitutes themselves."""
    before = {name: vars(module)[name] for name in substitutes if name in vars(module)}
    vars(module).update(substitutes)
    try:
        yield
    finally:
        for name in substitutes:
            del vars(module)[name]
        vars(module).update(before)
