"""PT-MoE and its peers: prompts composed per input for a frozen language model."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Nothing heavy is imported before a name is used: `import ptmoe` does not import torch.
_HOMES = {
    "METHODS": "methods",
    "method_named": "methods",
    "PromptedCausalLM": "models.causal",
    "attach": "models.attach",
    "count_parameters": "models.attach",
    "load_adapter": "models.attach",
    "RoutingCallback": "train.routing",
    "Example": "tasks",
    "load_task": "tasks",
    "score": "tasks",
    "stream_task": "tasks",
    "PtmoeError": "errors",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return ["__version__", *_HOMES, *_configs()]
    if name in _HOMES:
        return getattr(importlib.import_module(f"ptmoe.{_HOMES[name]}"), name)
    if name.endswith("Config") and name in _configs():
        return getattr(importlib.import_module("ptmoe.methods"), name)
    raise AttributeError(f"module 'ptmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__getattr__("__all__"))


def _configs() -> list[str]:
    """The config classes of `ptmoe.methods`, without a list of them here."""
    return [name for name in importlib.import_module("ptmoe.methods").__all__ if name.endswith("Config")]
