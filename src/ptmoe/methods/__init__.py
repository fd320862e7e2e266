"""The methods, one file each. A new one is a file here and a line in `METHODS`."""

from ptmoe.methods.attempt import ATTEMPTConfig
from ptmoe.methods.base import MethodConfig, Prompt, PromptConfig, PromptEncoder, Routing, VirtualTokensConfig
from ptmoe.methods.dpt import DPTConfig
from ptmoe.methods.ft import FTConfig
from ptmoe.methods.hydralora import HydraLoRAConfig
from ptmoe.methods.ia3 import IA3Config
from ptmoe.methods.lora import LoRAConfig
from ptmoe.methods.lora_variants import (
    CorDAConfig,
    DoRAConfig,
    EVAConfig,
    KaSAConfig,
    LoRAFAConfig,
    PiSSAConfig,
    RiemannianConfig,
)
from ptmoe.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from ptmoe.methods.p_tuning import PTuningConfig
from ptmoe.methods.prefix_tuning import PrefixTuningConfig
from ptmoe.methods.pt import PTConfig
from ptmoe.methods.pt_moe import PTMoEConfig
from ptmoe.methods.smop import SMoPConfig
from ptmoe.methods.vera import VeRAConfig

METHODS: dict[str, type[MethodConfig]] = {
    config.method: config
    for config in (
        PTMoEConfig,
        PTConfig,
        DPTConfig,
        SMoPConfig,
        ATTEMPTConfig,
        PTuningConfig,
        PrefixTuningConfig,
        MultitaskPromptTuningConfig,
        FTConfig,
        LoRAConfig,
        HydraLoRAConfig,
        DoRAConfig,
        PiSSAConfig,
        EVAConfig,
        CorDAConfig,
        KaSAConfig,
        RiemannianConfig,
        LoRAFAConfig,
        VeRAConfig,
        IA3Config,
    )
}

__all__ = [
    "METHODS",
    "ATTEMPTConfig",
    "CorDAConfig",
    "DPTConfig",
    "DoRAConfig",
    "EVAConfig",
    "FTConfig",
    "HydraLoRAConfig",
    "IA3Config",
    "KaSAConfig",
    "LoRAConfig",
    "LoRAFAConfig",
    "MethodConfig",
    "MultitaskPromptTuningConfig",
    "PTConfig",
    "PTMoEConfig",
    "PTuningConfig",
    "PiSSAConfig",
    "PrefixTuningConfig",
    "Prompt",
    "PromptConfig",
    "PromptEncoder",
    "RiemannianConfig",
    "Routing",
    "SMoPConfig",
    "VeRAConfig",
    "VirtualTokensConfig",
]
