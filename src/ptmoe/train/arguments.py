"""A run's options as arguments of `transformers.TrainingArguments`, and what it, its `Trainer` or a run refuse of them:
all of it is found out before the base is loaded."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ptmoe.errors import PtmoeError, near, shown
from ptmoe.train.optimizer import REFUSED, check_optimizer_name, make_optimizer
from ptmoe.train.options import TrainOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ptmoe.methods.base import MethodConfig

# Options whose names `TrainingArguments` has as well, but which are carried out here.
NOT_PASSED_ON = {"output_dir", "torch_compile", "gradient_checkpointing", "fsdp"}
NEED_EVALUATION = {
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps"),
    *("per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics"),
    *("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "do_eval", "do_predict"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
}
WITHOUT_EFFECT = {
    "use_liger_kernel": "has no effect on a prompted model: leave it out",
    "liger_kernel_config": "has no effect on a prompted model: leave it out",
    "deepspeed": "would shard the adapter: fsdp shares the base alone",
    "fsdp_config": "would shard the adapter: fsdp shares the base alone",
    "resume_from_checkpoint": "has no effect: --resume continues a run",
}
OF_EQUAL_BATCHES = ("train_sampling_strategy", "dataloader_drop_last")  # and not of batches by tokens
CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
# What `transformers` takes as it is, to fail or to compute nonsense with it.
RANGES = {"label_smoothing_factor": (0.0, 1.0), "neftune_noise_alpha": (0.0, float("inf"))}
CHOICES = {"include_num_input_tokens_seen": ("all", "non_padding", "no", True, False)}


def training_arguments(
    options: TrainOptions, config: MethodConfig, folder: Path | str, **own: Any
) -> TrainingArguments:
    """
    Args:
        options: of the run.
        config: its method's.
        folder: of the checkpoints.
        **own: what the run itself has decided.
    """
    import torch
    from transformers import TrainingArguments

    shared = ({field.name for field in fields(TrainingArguments)} & TrainOptions.model_fields.keys()) - NOT_PASSED_ON
    chosen = {
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # All of a prompt's parameters get a gradient at every step; parts of a base may lie idle.
        "ddp_find_unused_parameters": config.changes_layers,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "use_cpu": not torch.accelerator.is_available(),  # or several processes on a CPU would each train alone
        **{name: value for name in shared if (value := getattr(options, name)) is not None},
        **options.trainer,
        **own,
    }
    if options.gradient_checkpointing:
        chosen["activation_checkpointing"] = True
    return TrainingArguments(output_dir=str(folder), **chosen)


def check_arguments(options: TrainOptions, config: MethodConfig, *, here: bool = True) -> None:
    """
    Args:
        options: of the run.
        config: its method's.
        here: the run is one of this machine, with its packages and its hardware.

    Raises:
        PtmoeError: what `check_trainer_arguments` and `check_optimizer_name` raise; and, of a run of this machine, a
            logger or an optimizer that cannot be used, or anything else that `transformers` refuses.
    """
    check_trainer_arguments(options)
    check_optimizer_name(options, config)
    if here:
        _check_logger(options.report_to)
        _rehearse(options, config)


def _rehearse(options: TrainOptions, config: MethodConfig) -> None:
    """Make the trainer, its batches and its optimizer for a module of one weight."""
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    from transformers import PretrainedConfig, Trainer

    stub: Any = nn.Sequential(nn.Linear(2, 2))
    stub.config = PretrainedConfig()  # the trainer reads it for some options
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself says it
        try:
            # Making the trainer would make the repository that is pushed to.
            arguments = training_arguments(options, config, folder, report_to="none", push_to_hub=False)
            data: Any = [{"input": 0.0}] * 2
            if options.gradient_checkpointing and (given := arguments.activation_checkpointing_kwargs):
                checkpoint(stub, nn.Parameter(stub[0].weight.detach()), **{"use_reentrant": True, **given})
            if arguments.train_sampling_strategy in ("random", "sequential"):  # the others read the lengths of rows
                Trainer(stub, arguments, train_dataset=data).get_train_dataloader()
        except Exception as error:  # whatever they raise
            raise PtmoeError(f"{REFUSED} {' '.join(str(error).split()) or type(error).__name__}") from None
        make_optimizer(options, arguments, stub)


def check_trainer_arguments(options: TrainOptions) -> None:
    """
    Raises:
        PtmoeError: `trainer` holds what `transformers.TrainingArguments` does not have, or what a run cannot follow.
    """
    if not options.trainer:
        return
    from transformers import TrainingArguments

    known = get_type_hints(TrainingArguments)
    given = {field.name: field for field in fields(TrainingArguments)}
    for name, value in options.trainer.items():
        if name not in known:
            raise PtmoeError(f"trainer: unknown key {name!r}{near(name, known)}")
        if name in TrainOptions.model_fields:
            raise PtmoeError(f"trainer: {name!r} is an option of the run itself: give it there")
        if name.startswith("torch_compile_"):
            raise PtmoeError(f"trainer: {name} compiles the model as a whole: torch_compile does so layer by layer")
        needed = known[name]  # `transformers` does not look, and fails anywhere
        try:
            TypeAdapter(needed, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError:
            needed = needed.__name__ if isinstance(needed, type) else needed
            raise PtmoeError(f"trainer: {name}={shown(value)}: needs {needed}") from None
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise PtmoeError(f"trainer: {name}={shown(value)}: needs a number of 64 bits")
        if value is None or value == given[name].default:
            continue
        if name in NEED_EVALUATION or (name, value) == ("save_strategy", "best"):
            raise PtmoeError(
                f"trainer: {name}={value!r} needs an evaluation during training, and a run evaluates after it: leave "
                "it out, or use ptmoe.train.PromptTrainer with an eval_dataset"
            )
        if name in WITHOUT_EFFECT:
            raise PtmoeError(f"trainer: {name} {WITHOUT_EFFECT[name]}")
        if name in OF_EQUAL_BATCHES and options.tokens_per_batch is not None:
            raise PtmoeError(f"trainer: {name} has no effect on batches by tokens: leave it or tokens_per_batch out")
        if name in CHECKPOINTING and not isinstance(value, dict):
            raise PtmoeError(f"trainer: {name}={shown(value)}: needs keys and values")
        choices = tuple(CHOICES.get(name) or given[name].metadata.get("choices", ()))
        if choices and value not in choices:
            raise PtmoeError(f"trainer: {name}={shown(value)}: needs one of {', '.join(map(str, choices))}")
        low, high = RANGES.get(name, (None, None))
        if low is not None and not low <= value <= high:
            raise PtmoeError(f"trainer: {name}={shown(value)}: needs a number from {low:g} to {high:g}")


def _check_logger(name: str) -> None:
    if name == "none":
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    if name in ("all", *get_available_reporting_integrations()):
        return
    try:
        for make in get_reporting_integration_callbacks(name):
            make()  # says what is missing
    except (ValueError, RuntimeError, ImportError) as error:
        raise PtmoeError(f"report_to={name!r}: {' '.join(str(error).split())}") from None
