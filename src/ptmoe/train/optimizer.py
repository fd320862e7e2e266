"""The optimizers that `transformers` offers, those for memory among them: whether one can be used is found out before
work is spent. And their state, in checkpoints without pickles."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError, near
from ptmoe.files import save_tensors
from ptmoe.train.options import TrainOptions

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from ptmoe.methods.base import MethodConfig
    from ptmoe.models.causal import PromptedCausalLM

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.json"
REFUSED = "transformers refuses these options:"


def updates_in_backward(optim: str) -> bool:
    """Whether the optimizer updates each weight as soon as it has its gradient, and keeps none."""
    return "lomo" in optim or optim.endswith("_layerwise")


def check_optimizer_name(options: TrainOptions, config: MethodConfig) -> None:
    """
    Raises:
        PtmoeError: an optimizer that does not exist, that the other options do not fit, or a method that has its own; a
            scheduler that does not exist, or lacks an argument, or gets one that it has not.
    """
    import torch
    from transformers import get_scheduler
    from transformers.training_args import OptimizerNames

    if options.optim is not None:
        if hasattr(config, "create_optimizer"):
            raise PtmoeError(
                f"optim={options.optim!r}: {config.method} consists in an optimizer of its own: leave it out"
            )
        known = [name.value for name in OptimizerNames]
        if options.optim not in known:
            raise PtmoeError(f"optim={options.optim!r}: no such optimizer{near(options.optim, known)}")
        if updates_in_backward(options.optim) and options.gradient_accumulation_steps > 1:
            raise PtmoeError(
                f"optim={options.optim!r} updates the weights while it computes the gradients, so it cannot add up "
                f"those of gradient_accumulation_steps={options.gradient_accumulation_steps}: leave that out"
            )
    if options.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise PtmoeError(
            f"lr_scheduler_type={options.lr_scheduler_type!r} follows an evaluation during training, and a run "
            "evaluates after it: take another"
        )
    given = options.trainer.get("lr_scheduler_kwargs")
    stub = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        given = json.loads(given) if isinstance(given, str) else given
        get_scheduler(options.lr_scheduler_type, stub, 1, 1_000_000, scheduler_specific_kwargs=given)
    except (ValueError, TypeError) as error:
        raise PtmoeError(f"{REFUSED} {' '.join(str(error).split())}") from None


def make_optimizer(options: TrainOptions, arguments: TrainingArguments, stub: nn.Module) -> None:
    """
    Raises:
        PtmoeError: the optimizer's package is missing, or its arguments do not fit.
    """
    from transformers import Trainer

    if options.optim_target_modules:
        arguments.optim_target_modules = "all-linear"  # of the one module; those of the model are checked with it
    try:
        make, given = Trainer.get_optimizer_cls_and_kwargs(arguments, stub)
        of: Any = stub.parameters()
        for name in ("params", "model", "optimizer_dict"):  # the last that is there, as in `Trainer`
            of = given.pop(name, of)
        make(of, **given)
    except Exception as error:  # whatever these packages raise
        what = REFUSED if options.optim is None else f"optim={options.optim!r} cannot be used:"
        raise PtmoeError(f"{what} {' '.join(str(error).split())}") from None


def check_targets(options: TrainOptions, model: PromptedCausalLM) -> None:
    """
    Raises:
        PtmoeError: none of the modules whose gradients are to be projected is a linear one that is trained.
    """
    if options.optim is None or not options.optim_target_modules:
        return
    from torch import nn
    from transformers.trainer_utils import check_target_module_exists

    wanted = options.optim_target_modules
    every = isinstance(wanted, str) and wanted.replace("_", "-") == "all-linear"
    trained = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if not any(every or check_target_module_exists(wanted, name) for name in trained):
        raise PtmoeError(
            f"optim_target_modules={wanted!r}: {options.optim} projects the gradients of linear modules, and "
            f"{model.method_config.method} trains "
            + (f"none of this name: one is {trained[0]}" if trained else "none: leave optim out, or take ft")
        )


def settle(optimizer: Any) -> None:
    """Give the weights the values to be saved and evaluated, which those of schedule-free optimizers in training are
    not."""
    if callable(settled := getattr(optimizer, "eval", None)):
        settled()


def save_state(optimizer: Any, scheduler: Any, optim: str, folder: Path) -> None:
    """Write both states, the optimizer's only if tensors, numbers and texts are all that it is."""
    import torch

    (folder / SCHEDULER).write_text(json.dumps(scheduler.state_dict()))
    saved = optimizer.state_dict()
    state = {f"{key}.{name}": value for key, part in saved["state"].items() for name, value in part.items()}
    tensors = {name: value.contiguous() for name, value in state.items() if type(value) is torch.Tensor}
    numbers = {name: value for name, value in state.items() if name not in tensors}
    try:
        if updates_in_backward(optim):
            raise TypeError("its state is not in its state_dict")
        metadata = {"param_groups": json.dumps(saved["param_groups"]), "numbers": json.dumps(numbers)}
        metadata["kind"] = _kind(optimizer)
    except TypeError:
        warnings.warn(
            f"checkpoints do not hold the state of {optim}, which is in objects of its own: a resumed run has the "
            "weights and the step, and starts its moments afresh",
            stacklevel=2,
        )
        return
    save_tensors(tensors, folder / OPTIMIZER, metadata)


def load_state(optimizer: Any, scheduler: Any, folder: Path, changed: bool) -> None:
    """Load what `save_state` has written in a folder. Where the options are `changed`, the rates and decays are theirs,
    and only the moments and the step are taken over, those of the same kind of optimizer."""
    from safetensors import safe_open
    from torch.optim.lr_scheduler import LambdaLR

    schedule = json.loads((folder / SCHEDULER).read_text())
    if changed:
        schedule["base_lrs"] = scheduler.base_lrs
    if (folder / OPTIMIZER).exists():
        state: dict[int | str, dict[str, Any]] = {}  # by parameter: its number or, in LoRA-FA's optimizer, its name
        with safe_open(folder / OPTIMIZER, "pt") as opened:  # loading moves the state to its parameters
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        for name, value in (tensors | json.loads(metadata["numbers"])).items():
            key, _, entry = name.rpartition(".")
            state.setdefault(int(key) if key.isdigit() else key, {})[entry] = value
        kind = _kind(optimizer)
        if metadata.get("kind", kind) == kind:  # earlier versions wrote none
            groups = json.loads(metadata["param_groups"])
            groups = _changed(optimizer, groups) if changed else groups
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        else:
            warnings.warn(f"the moments of {metadata['kind']} are none of {kind}, which starts afresh", stacklevel=2)
    scheduler.load_state_dict(schedule)
    if changed and isinstance(scheduler, LambdaLR):
        factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
        rates = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _class(optimizer: Any) -> type:
    """Of which it is, within `accelerate`'s."""
    return type(getattr(optimizer, "optimizer", optimizer))


def _kind(optimizer: Any) -> str:
    return f"{_class(optimizer).__module__}.{_class(optimizer).__qualname__}"


def _changed(optimizer: Any, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups with what it has counted in those of a checkpoint, as schedule-free ones do: what is in
    all of its groups, and no argument of its class."""
    counted = optimizer.defaults.keys() - inspect.signature(_class(optimizer)).parameters.keys()
    groups = zip(optimizer.state_dict()["param_groups"], saved, strict=True)
    return [now | {name: before[name] for name in counted & before.keys()} for now, before in groups]
