"""The methods, one file each. A new one is a file here and an import line below.

Those of `peft` that need no file of their own are in `ptmoe.methods.shelf`; `method_named` knows them as well.
"""

from collections import UserDict
from typing import Any

from ptmoe.errors import PtmoeError, near
from ptmoe.methods import shelf
from ptmoe.methods.attempt import ATTEMPTConfig as ATTEMPTConfig
from ptmoe.methods.ba_lora import BALoRAConfig as BALoRAConfig
from ptmoe.methods.base import MethodConfig as MethodConfig
from ptmoe.methods.base import Prompt as Prompt
from ptmoe.methods.base import PromptConfig as PromptConfig
from ptmoe.methods.base import PromptEncoder as PromptEncoder
from ptmoe.methods.base import Routing as Routing
from ptmoe.methods.base import VirtualTokensConfig as VirtualTokensConfig
from ptmoe.methods.bilora import BiLoRAConfig as BiLoRAConfig
from ptmoe.methods.compacter import CompacterConfig as CompacterConfig
from ptmoe.methods.corda import CorDAConfig as CorDAConfig
from ptmoe.methods.dora import DoRAConfig as DoRAConfig
from ptmoe.methods.dpt import DPTConfig as DPTConfig
from ptmoe.methods.edora import EDoRAConfig as EDoRAConfig
from ptmoe.methods.ept import EPTConfig as EPTConfig
from ptmoe.methods.eva import EVAConfig as EVAConfig
from ptmoe.methods.ffa_lora import FFALoRAConfig as FFALoRAConfig
from ptmoe.methods.ft import FTConfig as FTConfig
from ptmoe.methods.fwd_prompt import FwdPromptConfig as FwdPromptConfig
from ptmoe.methods.goat import GOATConfig as GOATConfig
from ptmoe.methods.hydralora import HydraLoRAConfig as HydraLoRAConfig
from ptmoe.methods.ia3 import IA3Config as IA3Config
from ptmoe.methods.id_spam import IDSPAMConfig as IDSPAMConfig
from ptmoe.methods.kasa import KaSAConfig as KaSAConfig
from ptmoe.methods.lora import LoRAConfig as LoRAConfig
from ptmoe.methods.lora_fa import LoRAFAConfig as LoRAFAConfig
from ptmoe.methods.lora_xs import LoRAXSConfig as LoRAXSConfig
from ptmoe.methods.lotr import LoTRConfig as LoTRConfig
from ptmoe.methods.mept import MEPTConfig as MEPTConfig
from ptmoe.methods.msplora import MSPLoRAConfig as MSPLoRAConfig
from ptmoe.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from ptmoe.methods.nlora import NLoRAConfig as NLoRAConfig
from ptmoe.methods.nora import NoRAConfig as NoRAConfig
from ptmoe.methods.p_tuning import PTuningConfig as PTuningConfig
from ptmoe.methods.pissa import PiSSAConfig as PiSSAConfig
from ptmoe.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from ptmoe.methods.pt import PTConfig as PTConfig
from ptmoe.methods.pt_moe import PTMoEConfig as PTMoEConfig
from ptmoe.methods.pt_moe_road import PTMoERoAdConfig as PTMoERoAdConfig
from ptmoe.methods.riemannian import RiemannianConfig as RiemannianConfig
from ptmoe.methods.smop import SMoPConfig as SMoPConfig
from ptmoe.methods.soka import SoKAConfig as SoKAConfig
from ptmoe.methods.sorsa import SORSAConfig as SORSAConfig
from ptmoe.methods.svfit import SVFitConfig as SVFitConfig
from ptmoe.methods.ulpt import ULPTConfig as ULPTConfig
from ptmoe.methods.vera import VeRAConfig as VeRAConfig
from ptmoe.settings import OF_PEFT, method_name


class Methods(UserDict[str, type[MethodConfig]]):
    """The configs by name. A short form of a type of `peft` is made when it is first used: importing `peft` takes
    seconds."""

    def __getitem__(self, name: str) -> type[MethodConfig]:
        if self.data[name] is MethodConfig:
            self.data[name] = shelf.shelf_method(name)
        return self.data[name]


WITH_FILES: list[type[MethodConfig]] = sorted(
    (
        value
        for value in vars().values()
        if isinstance(value, type) and issubclass(value, MethodConfig) and hasattr(value, "method")
    ),
    key=lambda config: (config.order, config.method),
)
METHODS = Methods({config.method: config for config in WITH_FILES} | dict.fromkeys(shelf.SHORT, MethodConfig))


def method_named(name: Any) -> type[MethodConfig]:
    """The config of a method: one of `METHODS`, or `peft:TYPE` for any type of the installed `peft`.

    Raises:
        PtmoeError: there is none of this name, or it is a type of `peft` that cannot be used here, and why.
    """
    name = method_name(str(name))
    if name.startswith(OF_PEFT):
        return shelf.shelf_method(name)
    if name not in METHODS:
        raise PtmoeError(f"unknown method {name!r}{near(name, METHODS)}")
    return METHODS[name]
