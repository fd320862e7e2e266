"""PT-MoE and its peers: prompts composed per input for a frozen language model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and editors do not run `__getattr__`
    from ptmoe.errors import PtmoeError as PtmoeError
    from ptmoe.methods import *  # noqa: F403
    from ptmoe.models.attach import attach as attach
    from ptmoe.models.attach import count_parameters as count_parameters
    from ptmoe.models.attach import load_adapter as load_adapter
    from ptmoe.models.causal import PromptedCausalLM as PromptedCausalLM
    from ptmoe.tasks import Example as Example
    from ptmoe.tasks import load_task as load_task
    from ptmoe.tasks import score as score
    from ptmoe.tasks import stream_task as stream_task
    from ptmoe.train.routing import RoutingCallback as RoutingCallback

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
    return [name for name in vars(importlib.import_module("ptmoe.methods")) if name.endswith("Config")]
