"""The methods, one file each. A new one is a file here and a line in `METHODS`."""

from ptmoe.methods.attempt import ATTEMPTConfig
from ptmoe.methods.base import MethodConfig, Prompt, PromptEncoder, Routing
from ptmoe.methods.dpt import DPTConfig
from ptmoe.methods.pt import PTConfig
from ptmoe.methods.pt_moe import PTMoEConfig
from ptmoe.methods.smop import SMoPConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.method: config for config in (PTMoEConfig, PTConfig, DPTConfig, SMoPConfig, ATTEMPTConfig)
}

__all__ = [
    "METHODS",
    "ATTEMPTConfig",
    "DPTConfig",
    "MethodConfig",
    "PTConfig",
    "PTMoEConfig",
    "Prompt",
    "PromptEncoder",
    "Routing",
    "SMoPConfig",
]
