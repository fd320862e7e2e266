"""A training run from options to a run folder (`ptmoe.runs.records` has its layout), in one straight line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from ptmoe.errors import PtmoeError, near
from ptmoe.models.bases import check_quantization, load_base
from ptmoe.runs.environment import environment, world_size
from ptmoe.runs.folders import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULT_FILE,
)
from ptmoe.runs.records import Result
from ptmoe.tasks import TASKS, Problems, is_file, load_task, stream_task, task_named, task_names
from ptmoe.tasks import local as local_task
from ptmoe.train.options import BASE, DEFAULT_METHOD, TrainOptions, method_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ptmoe.evaluate import Evaluation
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.base import Example
    from ptmoe.train.rows import TokenRows
    from ptmoe.train.trainer import PromptTrainer

RUN_FILES = (CONFIG_FILE, RESULT_FILE, ADAPTER_FOLDER, METRICS_FILE, CHECKPOINTS_FOLDER)


@dataclass
class Trained:
    """A finished run: its folder, its result, the model with its adapter, and its evaluations."""

    folder: Path
    result: Result
    model: PromptedCausalLM
    tokenizer: PreTrainedTokenizerBase
    evaluations: list[Evaluation]


def training_examples(options: TrainOptions, problems: Problems, say: Callable[[str], None]) -> Iterable[Example]:
    """The first is read at once, so that missing data is said before the base is loaded; a task's others as they are
    needed, so that no data set has to fit into memory as text."""
    if options.task is None:
        assert options.data is not None
        keys = local_task.Keys(options.prompt_key, options.completion_key, options.separator)
        return local_task.load(options.data, keys, problems)[: options.max_examples]
    stream = stream_task(options.task, "train", options.data_dir, problems=problems, say=say)
    first = next(stream, None)
    if first is None:
        raise PtmoeError(f"{options.task} ({options.data_dir or 'train'}) holds no example: needs at least one")
    return islice(chain([first], stream), options.max_examples)


def evaluation_examples(options: TrainOptions, say: Callable[[str], None]) -> list[list[Example]]:
    """Of each task in `eval_task`; by default the test split of nano's own tasks."""
    name = options.eval_task
    if name is None and options.task is not None and not is_file(options.task):
        names = task_names(options.task)
        name = ",".join(names) if all(TASKS[one].generate for one in names) else None
    if name is None:
        return []
    folder = options.eval_data_dir
    if folder is None and options.data_dir is not None and Path(options.data_dir).is_dir():
        folder = options.data_dir
    return [
        load_task(
            one, "test", folder, max_examples=options.eval_examples, problems=Problems(skip=options.skip_bad), say=say
        )
        for one in task_names(name)
    ]


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = print,
) -> Trained:
    """Train an adapter and write its run folder.

    Started by `torchrun` or `accelerate launch`, processes share the batches, and the first evaluates and writes.

    Args:
        options: everything that decides the run.
        resume: go on from the last checkpoint in `output_dir`.
        callbacks: of `transformers`, for progress.
        say: told in a line what a user should know: examples left out or cut.

    Raises:
        PtmoeError: unfit options or data, before anything is written.
        DivergedError: the loss became NaN; the last good adapter is saved, if there is one.
    """
    config = method_config(options.method)
    check_quantization(options.quantization)
    config.check_quantization(options.quantization)
    folder = run_folder(options, resume)
    # A stream cannot wait for its end to refuse what is bad; a file's bad lines are counted first.
    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    examples, held_out = training_examples(options, problems, say), evaluation_examples(options, say)
    _check_trainer_arguments(options)

    from ptmoe.models.attach import attach
    from ptmoe.train.data import fit

    model, tokenizer, chat = _base(options)
    positions = (model.max_positions or 2**31) - config.num_virtual_tokens
    fitted = fit(
        examples,
        tokenizer,
        min(positions, options.max_length or positions),
        options.truncation,
        chat=chat,
        cache=options.token_cache,
        say=say,
    )
    batches = starting_batches(fitted.rows, options.per_device_train_batch_size) if config.needs_batches else None
    attach(model, config, seed=options.seed, tokenizer=tokenizer, batches=batches)
    if problems.count:
        say(f"left out {problems.listed()}")
    if fitted.cut or fitted.left_out:
        say(
            f"{fitted.left_out:,} of {len(fitted.rows) + fitted.left_out:,} examples left out and {fitted.cut:,} cut: "
            f"longer than {min(positions, options.max_length or positions):,} tokens (--max-length, or the base's "
            f"positions less {config.num_virtual_tokens} virtual tokens)"
        )

    resolved = {
        "method": {"name": config.method, **model.method_config.model_dump()},
        "chat": chat,
        "learning_rate": options.learning_rate or config.default_learning_rate,
    }
    options = options.replace(**resolved)
    trainer = _trainer(model, fitted.rows, options, folder, callbacks)
    first = trainer.is_world_process_zero()
    if first:
        _begin(folder, options, model)
    started = time.monotonic()
    _fit(trainer, folder, resume)
    result = Result(
        name=config.method,
        method=config.method,
        trainable_parameters=model.num_parameters(only_trainable=True),
        train_seconds=round(time.monotonic() - started, 3),
        steps=trainer.state.global_step,
        examples=len(fitted.rows),
        examples_cut=fitted.cut,
        examples_left_out=fitted.left_out,
    )
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.destroy_process_group()  # the others leave while the first evaluates
    if not first:
        return Trained(folder, result, model, tokenizer, [])
    result.write(folder / RESULT_FILE)
    evaluations = _evaluate(model, tokenizer, held_out, options, folder)
    return Trained(folder, result, model, tokenizer, evaluations)


def evaluate_base(options: TrainOptions, *, say: Callable[[str], None] = print) -> None:
    """Evaluate the base as it is, into a run folder in which nothing was trained; its method is `base`.

    Args:
        options: as of the runs that it stands beside.
        say: told in a line what a user should know.

    Raises:
        PtmoeError: unfit options or data, before anything is written.
    """
    check_quantization(options.quantization)
    folder = run_folder(options, resume=False)
    held_out = evaluation_examples(options, say)

    from accelerate import PartialState

    model, tokenizer, chat = _base(options)
    model.to(PartialState().device)  # where a trainer would put it
    options = options.replace(method={"name": BASE}, chat=chat)
    _begin(folder, options, model)
    result = Result(name=BASE, method=BASE, trainable_parameters=0, train_seconds=0.0, steps=0)
    result.write(folder / RESULT_FILE)
    _evaluate(model, tokenizer, held_out, options, folder)


def _base(options: TrainOptions) -> tuple[PromptedCausalLM, PreTrainedTokenizerBase, bool]:
    """The base without an adapter, its tokenizer, and whether prompts go into its chat template."""
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.tokens import uses_chat

    base, tokenizer = load_base(
        options.model, revision=options.revision, dtype=options.dtype, quantization=options.quantization
    )
    chat = uses_chat(task_named(options.task or str(options.data)), tokenizer, options.chat)
    return PromptedCausalLM(base), tokenizer, chat


def _begin(folder: Path, options: TrainOptions, model: PromptedCausalLM) -> None:
    """The run folder with what is known before the run."""
    folder.mkdir(parents=True, exist_ok=True)
    options.write(folder / CONFIG_FILE)
    fast_paths = getattr(model, "fast_paths", None)
    environment(options.seed, None if fast_paths is None else fast_paths()).write(folder / ENVIRONMENT_FILE)


def _evaluate(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Iterable[list[Example]],
    options: TrainOptions,
    folder: Path,
) -> list[Evaluation]:
    """On each task's examples, as the resolved options say."""
    from ptmoe.evaluate import evaluate

    return [
        evaluate(
            model,
            tokenizer,
            examples,
            batch_size=options.eval_batch_size,
            max_new_tokens=options.max_new_tokens,
            max_length=options.max_length,
            chat=bool(options.chat),
            folder=folder,
            overwrite=True,
        )
        for examples in held_out
    ]


def starting_batches(rows: TokenRows, size: int) -> list[dict[str, Tensor]]:
    """Examples spread over the data, for methods that start from the activations that they give."""
    from ptmoe.train.data import collate
    from ptmoe.train.routing import EXAMPLES

    count = min(EXAMPLES, len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return [collate(chosen[start : start + size]) for start in range(0, count, size)]


def run_folder(options: TrainOptions, resume: bool) -> Path:
    """The run's folder, checked but not made: by default a new one under `runs/`.

    Raises:
        PtmoeError: it holds a run already, or none to resume.
    """
    if options.output_dir is None:
        if resume:
            raise PtmoeError("--resume needs the run: give its --output-dir")
        if world_size() > 1:
            raise PtmoeError(f"{world_size()} processes write one run: name its folder with --output-dir")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{options.method.get('name', DEFAULT_METHOD)}-{stamp}"
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise PtmoeError(f"{folder} is a file: name a folder for the run")
    held = [name for name in RUN_FILES if (folder / name).exists()]
    if resume and not any((folder / CHECKPOINTS_FOLDER).glob("checkpoint-*")):
        raise PtmoeError(f"{folder} holds no checkpoint to resume from")
    if held and not resume:
        raise PtmoeError(
            f"{folder} already holds a run ({', '.join(held)}): choose another --output-dir, or go on with --resume"
        )
    return folder


def _trainer(
    model: PromptedCausalLM,
    rows: TokenRows,
    options: TrainOptions,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> PromptTrainer:
    """The trainer of a run.

    Raises:
        PtmoeError: what `transformers` refuses: a scheduler that it does not know, a logger that is not installed, …
    """
    import torch
    from transformers import TrainingArguments

    from ptmoe.fast.compiled import compile_layers
    from ptmoe.train.batches import TokenBatches
    from ptmoe.train.data import collate
    from ptmoe.train.routing import RoutingCallback
    from ptmoe.train.trainer import MetricsFile, PromptTrainer

    chosen = {
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        **{name: getattr(options, name) for name in TrainOptions.model_fields if name in TRAINER_FIELDS},
        **options.trainer,
    }
    if options.gradient_checkpointing:
        chosen["activation_checkpointing"] = True
    model.packing = options.packing
    if options.packing:
        model.can_pack()  # or say why not, before anything is written
    if options.torch_compile:
        compile_layers(model.base_model)
    batches = None
    if options.tokens_per_batch is not None:
        lengths = rows.lengths + model.num_virtual_tokens
        batches = TokenBatches(
            lengths,
            options.tokens_per_batch,
            padded=not model.can_pack(),
            seed=options.seed,
            processes=world_size(),
        )
        # For what counts in rows: the routing's first examples come in batches that fit.
        chosen["per_device_train_batch_size"] = max(1, options.tokens_per_batch // int(lengths.max()))
        chosen["accelerator_config"] = {"even_batches": False}
    made = not folder.exists()
    try:
        trainer = PromptTrainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder / CHECKPOINTS_FOLDER), **chosen),
            train_dataset=rows,
            data_collator=collate,
            batches=batches,
            callbacks=[RoutingCallback(), MetricsFile(folder / METRICS_FILE), *callbacks],
        )
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        if made and folder.exists():  # the trainer makes its folder first
            shutil.rmtree(folder)
        raise PtmoeError(f"transformers refuses these options: {' '.join(str(error).split())}") from None
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":  # the metrics go to the file and to `callbacks`
            trainer.remove_callback(callback)
    return trainer


def _fit(trainer: PromptTrainer, folder: Path, resume: bool) -> None:
    """Train; afterwards the adapter is in `folder/adapter`, also where the loss diverged and there is one to save."""
    from ptmoe.train.trainer import DivergedError

    model = trainer.model
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except DivergedError as error:
        if error.restored is not None:
            model.save_pretrained(folder / "adapter")
            error.args = (f"{error}; saved in {folder / 'adapter'}",)
        raise
    model.eval()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / ADAPTER_FOLDER)


TRAINER_FIELDS = frozenset(
    "seed learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm max_steps num_train_epochs "
    "per_device_train_batch_size gradient_accumulation_steps bf16 fp16 logging_steps save_steps save_total_limit "
    "report_to".split()
)


def _check_trainer_arguments(options: TrainOptions) -> None:
    if not options.trainer:
        return
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    for name in options.trainer:
        if name not in known:
            raise PtmoeError(f"trainer: unknown key {name!r}{near(name, known)}")
        if name in TRAINER_FIELDS or name == "output_dir":
            raise PtmoeError(f"trainer: {name!r} is an option of the run itself: give it there")
