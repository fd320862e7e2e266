"""A base of which every process of a launch holds a part, for one that does not fit on a device.

The weights of a layer are gathered while it is computed, forward and backward, and given up after it. Two libraries do
that, each set up as its users know it: torch's FSDP2, which `transformers` applies while it loads (a process reads its
own part of each file), and DeepSpeed's ZeRO-3. They are given the frozen base alone: an adapter stays whole in every
process, and its gradients are averaged as those of any other model are.
"""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.runs.environment import world_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from ptmoe.methods.base import MethodConfig

FSDP, ZERO3 = "fsdp", "zero3"
BY_ACCELERATE = {FSDP: "ACCELERATE_USE_FSDP", ZERO3: "ACCELERATE_USE_DEEPSPEED"}  # what `accelerate launch` sets


def sharding_asked_for(fsdp: bool = False) -> str | None:
    """`"fsdp"` or `"zero3"`, as an option or the configuration of `accelerate launch` asks for it, else None.

    Raises:
        PtmoeError: there is one process, or the configuration asks for what a frozen base has no use for.
    """
    asked = [name for name, variable in BY_ACCELERATE.items() if _true(variable) or (fsdp and name == FSDP)]
    if not asked:
        return None
    if len(asked) > 1:
        raise PtmoeError("fsdp within a DeepSpeed launch: leave one of the two out")
    if world_size() == 1:
        raise PtmoeError(f"{asked[0]} shares the base among several processes, and this is one: start more")
    if asked[0] == ZERO3 and importlib.util.find_spec("deepspeed") is None:
        raise PtmoeError("zero3 needs DeepSpeed: pip install deepspeed")
    if _true("FSDP_OFFLOAD_PARAMS"):
        raise PtmoeError("fsdp_offload_params: true is not supported: set it to false, or take more processes")
    if _true("FSDP_ACTIVATION_CHECKPOINTING"):
        raise PtmoeError("fsdp_activation_checkpointing: true: use --gradient-checkpointing instead")
    return asked[0]


def check_sharding(engine: str, config: MethodConfig, *, torch_compile: bool) -> None:
    """
    Raises:
        PtmoeError: a method that changes the base's layers, or compiled layers.
    """
    if config.changes_layers:
        raise PtmoeError(
            f"{config.method} changes the base's layers, which {engine} shares among the processes: use a method of "
            "prompts, or leave the sharding out"
        )
    if torch_compile:
        raise PtmoeError(f"{engine} gathers a layer's weights in hooks, which a compiled layer leaves out: choose one")


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


@contextmanager
def loading_shards(engine: str | None, config: PretrainedConfig | None, dtype: str) -> Iterator[dict[str, Any]]:
    """Within it `from_pretrained` loads this process's part of a model, or without a config the whole of it; gives
    options for it. `engine` is as from `sharding_asked_for`.

    Raises:
        PtmoeError: a base without repeated layers.
    """
    if config is None:
        yield {}
    elif engine == FSDP:
        from transformers.distributed import DistributedConfig

        yield {"distributed_config": DistributedConfig(fsdp_size=world_size(), fsdp_plan=_plan(config))}
    else:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        saved = _name(config.dtype or "float32")
        kept = HfDeepSpeedConfig(_zero3_config(saved if dtype == "auto" else dtype))  # looked for while it lives
        yield {}
        del kept


def _plan(config: PretrainedConfig) -> dict[str, str]:
    """What is gathered at a time: a layer, the embedding, the head. `transformers`' own plan goes by Llama's names."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in model.named_modules()}
    layers = {f"{names[one].rpartition('.')[0]}.*" for one in names if isinstance(one, GradientCheckpointingLayer)}
    if not layers:
        raise PtmoeError(f"{type(model).__name__} has no repeated layers to share among processes: use zero_stage: 3")
    first, last = names[model.get_input_embeddings()], names[model.get_output_embeddings()]
    return dict.fromkeys([*sorted(layers), first], "free_full_weight") | {last: "keep_full_weight"}


def finish_sharding(base: PreTrainedModel, engine: str) -> None:
    """Make a base that was loaded in shards gather its weights wherever it is called."""
    import torch

    base.requires_grad_(False).eval()
    if engine == ZERO3:
        import deepspeed

        vars(base)["ptmoe_engine"], *_ = deepspeed.initialize(model=base, config=_zero3_config(_name(base.dtype)))
        whole = _whole_embedding(base.get_input_embeddings())
        vars(base)["get_input_embeddings"] = lambda: whole
        base.eval()
    else:  # FSDP takes the first module that is called for the outermost, and later that is the embedding
        with torch.no_grad():
            base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)


def _whole_embedding(embedding: Any) -> nn.Module:
    """A copy of an input embedding that DeepSpeed does not know of: prompts are made from it, and much reads its shape,
    which a parameter does not have while its parts are with all processes."""
    import deepspeed
    from torch import nn

    with deepspeed.zero.GatheredParameters([embedding.weight]):
        weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    copied: nn.Module = object.__new__(type(embedding))
    vars(copied).update(vars(embedding), _parameters={"weight": weight})
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(copied)[hooks] = OrderedDict()
    return copied


def leave_accelerate_out() -> None:
    """`accelerate` would shard the adapter as well: it is left to train what is whole."""
    for variable in BY_ACCELERATE.values():
        os.environ.pop(variable, None)


def _zero3_config(dtype: str) -> dict[str, Any]:
    """What `accelerate` makes of its own configuration, as far as it is about the parameters.

    Raises:
        PtmoeError: another stage than 3, or parameters that are offloaded.
    """
    from accelerate import DeepSpeedPlugin

    stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3"))
    zero: dict[str, Any] = dict(DeepSpeedPlugin(zero_stage=stage).deepspeed_config["zero_optimization"])
    if zero.get("stage") != 3:
        raise PtmoeError(
            f"zero_stage: {zero.get('stage')} shards gradients and the optimizer's state, of which an adapter has next "
            "to nothing: set it to 3, which shards the base, or leave DeepSpeed out"
        )
    if ((zero.pop("offload_param", None) or {}).get("device") or "none") != "none":
        raise PtmoeError("offload_param_device is not supported: set it to none, or take more processes")
    zero.pop("offload_optimizer", None)
    zero.setdefault("stage3_max_reuse_distance", 0)  # DeepSpeed would keep 10⁹ parameters for the backward pass
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {key: value for key, value in zero.items() if value != "auto"},
        **({half: {"enabled": True}} if half else {}),
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
