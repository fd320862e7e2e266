"""PT-MoE and its peers: prompts composed per input for a frozen language model."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Nothing heavy is imported before a name is used: `import ptmoe` does not import torch.
_HOMES = {
    "METHODS": "methods",
    "ATTEMPTConfig": "methods",
    "CorDAConfig": "methods",
    "DoRAConfig": "methods",
    "DPTConfig": "methods",
    "EVAConfig": "methods",
    "FTConfig": "methods",
    "HydraLoRAConfig": "methods",
    "IA3Config": "methods",
    "KaSAConfig": "methods",
    "LoRAConfig": "methods",
    "LoRAFAConfig": "methods",
    "MultitaskPromptTuningConfig": "methods",
    "PiSSAConfig": "methods",
    "PrefixTuningConfig": "methods",
    "PTConfig": "methods",
    "PTMoEConfig": "methods",
    "PTuningConfig": "methods",
    "RiemannianConfig": "methods",
    "SMoPConfig": "methods",
    "VeRAConfig": "methods",
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

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
