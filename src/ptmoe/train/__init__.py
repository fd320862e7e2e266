"""Training on `transformers.Trainer`."""

import importlib
from typing import Any

_HOMES = {
    "TrainOptions": "options",
    "train": "recipe",
    "PromptTrainer": "trainer",
    "RoutingCallback": "routing",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.train.{_HOMES[name]}"), name)
