"""Training on `transformers.Trainer`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptmoe.train.options import TrainOptions as TrainOptions
    from ptmoe.train.recipe import train as train
    from ptmoe.train.routing import RoutingCallback as RoutingCallback
    from ptmoe.train.trainer import PromptTrainer as PromptTrainer

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
