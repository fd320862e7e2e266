"""A training run from options to a run folder (`ptmoe.runs.records` has its layout), in one straight line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.files import check_name
from ptmoe.models.bases import check_quantization, load_base
from ptmoe.models.sharding import check_sharding, leave_accelerate_out, sharding_asked_for
from ptmoe.runs.environment import peak_memory, rank, world_size
from ptmoe.runs.folders import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    RESULT_FILE,
    distinct_tasks,
    writing,
)
from ptmoe.runs.records import Change, Result
from ptmoe.tasks import Problems, task_named
from ptmoe.train.arguments import check_arguments, training_arguments
from ptmoe.train.checkpoints import newest_whole
from ptmoe.train.examples import (
    Fingerprint,
    askable,
    evaluated_fingerprints,
    evaluation_examples,
    evaluation_split,
    forgetting_examples,
    training_examples,
)
from ptmoe.train.notes import Overlap, notes
from ptmoe.train.optimizer import REFUSED, check_targets
from ptmoe.train.options import BASE, DEFAULT_METHOD, PLACES, TrainOptions, method_config
from ptmoe.train.processes import ALONE, TIMEOUT, Processes, on_one_device
from ptmoe.train.resume import (
    Differences,
    changed_since,
    check_base,
    check_checkpoint,
    check_data,
    continued,
    has_checkpoints,
    is_run,
    record_start,
)

# `transformers` and all that needs it take seconds to import, so functions import them: bad options and missing data
# are reported at once.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ptmoe.evaluate import Evaluation
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.base import Example
    from ptmoe.train.rows import TokenRows
    from ptmoe.train.steps import Progress
    from ptmoe.train.trainer import PromptTrainer

RUN_FILES = (CONFIG_FILE, RESULT_FILE, ADAPTER_FOLDER, METRICS_FILE)  # and checkpoints


@dataclass
class Trained:
    """A finished run: its folder, its result, the model with its adapter, and its evaluations."""

    folder: Path
    result: Result
    model: PromptedCausalLM
    tokenizer: PreTrainedTokenizerBase
    evaluations: list[Evaluation]


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    force: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    router_progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Trained:
    """Train an adapter and write its run folder.

    Started by `torchrun` or `accelerate launch`, processes share the batches of training and evaluation, and the first
    writes.

    Args:
        options: everything that decides the run.
        resume: continue from the last whole checkpoint in `output_dir`; where there is none yet, start.
        force: resume with another base, other data or other options than the folder records, and record both.
        callbacks: of `transformers`, for progress.
        router_progress: of the router's start, before the first step: examples done and in all, and None.
        say: gets a line of text for each thing a user should know: examples left out or cut.

    Raises:
        PtmoeError: unfit options or data, before anything is written.
        DivergedError: the loss or the weights became NaN; the last good adapter is saved, if there is one.
        InterruptedRunError: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    method_config(options.method)  # its name may become the folder's
    folder = run_folder(options, resume)
    sharding = sharding_asked_for(options.fsdp)
    leave_accelerate_out()
    decided = options.model_dump(exclude=PLACES) | {"sharding": sharding}
    timeout = float(options.trainer.get("ddp_timeout", TIMEOUT))
    with writing(folder) if rank() == 0 else nullcontext(), Processes(decided, timeout) as processes:
        return _train(options, folder, resume, force, callbacks, router_progress, say, processes, sharding)


def _train(
    options: TrainOptions,
    folder: Path,
    resume: bool,
    force: bool,
    callbacks: Sequence[TrainerCallback],
    router_progress: Progress | None,
    say: Callable[[str], None],
    processes: Processes,
    sharding: str | None,
) -> Trained:
    if force and not resume:
        raise PtmoeError("--force is for a run that is resumed: give --resume as well")
    checkpoint, different = None, Differences()
    if resume and is_run(folder):
        options, different = continued(options, folder, force)
        checkpoint = newest_whole(folder / CHECKPOINTS_FOLDER, say)
        different |= {} if checkpoint is None else check_checkpoint(checkpoint, options, force)
    if resume and checkpoint is None:
        say(f"{folder} holds no checkpoint yet: the run starts from the beginning")
    config = method_config(options.method)
    check_quantization(options.quantization)
    config.check_quantization(options.quantization)
    if sharding is not None:
        check_sharding(sharding, config, torch_compile=options.torch_compile)
    # A stream is used before it ends, so a bad record in it is refused at once; a file's bad lines are counted first.
    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    examples, held_out = training_examples(options, problems, say), evaluation_examples(options, say)
    known = forgetting_examples(options) if options.validation_examples is None else []
    if options.validation_examples is not None and options.eval_task is not None:
        say(f"not evaluated on {options.eval_task}: with validation_examples a run is evaluated on those alone")
    check_arguments(options, config)

    from ptmoe.evaluate.choices import labels_by_task
    from ptmoe.evaluate.forgetting import encode_texts, forgetting, text_loss
    from ptmoe.fast.compiled import compile_layers
    from ptmoe.models.attach import attach
    from ptmoe.tasks.tokens import row_length
    from ptmoe.train.callbacks import OnBegin, logged_until
    from ptmoe.train.data import collate, fit
    from ptmoe.train.interruption import fit_until_interrupted
    from ptmoe.train.routing import RoutingCallback, sample_batches

    if sharding is not None:
        processes.join()  # before the base is loaded: each process gets its part
    model, tokenizer, chat = _base(options, sharding)
    if checkpoint is not None:
        different |= check_base(checkpoint, model, force)
    if options.score == "choices":  # what the tokenizer or its template cannot do should show before the training
        for name, tested in held_out.items():
            labels_by_task(task_named(name), tested, tokenizer, chat=chat)
    length = row_length(model.max_positions, config.num_virtual_tokens, options.max_length)
    shown: dict[str, Any] = {"cache": options.token_cache, "problems": problems, "say": say}
    overlap, trained_on, evaluated_on = Overlap(held_out), Fingerprint(), evaluated_fingerprints(held_out, known)
    rows = fit(trained_on.watched(overlap.watched(examples)), tokenizer, length, options.truncation, chat=chat, **shown)
    held_out = askable(held_out, tokenizer, options, chat, say)
    texts = encode_texts(known, tokenizer, model.max_positions, config.num_virtual_tokens)
    data = rows.fingerprint()
    processes.agree(data=data)
    if resume:
        different |= check_data(folder, data, options, force, say)
    size = options.per_device_train_batch_size
    batches = sample_batches(rows, collate, size) if config.needs_batches else None
    attach(model, config, seed=options.seed, tokenizer=tokenizer, batches=batches)
    for line in notes(rows, problems, overlap, length, config.num_virtual_tokens):
        say(line)
    options = options.replace(
        method={"name": config.method, **model.method_config.model_dump()},
        chat=chat,
        learning_rate=options.learning_rate or config.learning_rate_on(model.base_model.config),
        revision=model.identity.revision or options.revision,
    )
    model.packing = options.packing
    if options.packing:
        model.can_pack()  # or says why not, before anything is written
    compile_failure = compile_layers(model.base_model) if options.torch_compile else None
    fast_paths = model.fast_paths()  # tried out in all processes, which a sharded base needs
    trainer = _trainer(model, rows, options, folder, [RoutingCallback(router_progress, say), *callbacks])
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    trainer.changed = bool(different) or changed_since(folder, step)
    first = trainer.is_world_process_zero()
    if first:
        change = Change(step=step, differences=different)
        of = {"base": model.identity.mark, "data": data, "trained_on": str(trained_on), "evaluated_on": evaluated_on}
        begin = partial(record_start, folder, options, fast_paths, change, of)
        trainer.add_callback(OnBegin(partial(begin, failure=compile_failure, say=say)))
    base_losses: list[float] = []
    if texts and config.trains_base and checkpoint is None:
        trainer.add_callback(OnBegin(lambda: base_losses.append(text_loss(model, texts))))
    before = logged_until(folder / METRICS_FILE, step)[1]
    peak, started = peak_memory(), time.monotonic()
    fit_until_interrupted(trainer, folder, checkpoint)
    result = Result(
        name=config.method,
        method=config.method,
        trainable_parameters=model.num_parameters(only_trainable=True),
        train_seconds=round(before + time.monotonic() - started, 3),
        steps=trainer.state.global_step,
        examples=len(rows),
        examples_cut=rows.cut,
        examples_left_out=rows.left_out,
        examples_evaluated=overlap.count,
        adapter_bytes=sum(path.stat().st_size for path in (folder / ADAPTER_FOLDER).glob("*.safetensors")),
        peak_memory=peak(),
    )
    try:
        if texts:
            result = result.model_copy(update={"forgetting": forgetting(model, texts, *base_losses)})
    except PtmoeError as error:  # a method that cannot be switched off, where a resumed run has changed the base before
        say(f"what the base forgets is not measured: {error}")
    if first:
        result.write(folder / RESULT_FILE)
    evaluations = evaluated(options, model, tokenizer, held_out, folder)
    processes.part()
    return Trained(folder, result, model, tokenizer, evaluations)


def evaluate_base(options: TrainOptions, *, say: Callable[[str], None] = print) -> None:
    """Evaluate the base as it is, into a run folder in which nothing was trained, with the options of the runs that it
    is compared with; its method is `base`.

    Raises:
        PtmoeError: unfit options or data, before anything is written.
    """
    check_quantization(options.quantization)
    folder = run_folder(options, resume=False)
    held_out = evaluation_examples(options, say)
    evaluated_on = evaluated_fingerprints(held_out, [])

    from accelerate import PartialState

    model, tokenizer, chat = _base(options)
    held_out = askable(held_out, tokenizer, options, chat, say)
    model.to(PartialState().device)  # where a trainer would put it
    options = options.replace(method={"name": BASE}, chat=chat, revision=model.identity.revision or options.revision)
    of = {"base": model.identity.mark, "evaluated_on": evaluated_on}
    record_start(folder, options, model.fast_paths(), of=of)
    result = Result(name=BASE, method=BASE, trainable_parameters=0, train_seconds=0.0, steps=0)
    result.write(folder / RESULT_FILE)
    evaluated(options, model, tokenizer, held_out, folder)


def _base(options: TrainOptions, sharding: str | None = None) -> tuple[PromptedCausalLM, PreTrainedTokenizerBase, bool]:
    """The base without an adapter, its tokenizer, and whether prompts go into its chat template."""
    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.tokens import uses_chat

    base, tokenizer = load_base(
        options.model,
        revision=options.revision,
        dtype=options.dtype,
        quantization=options.quantization,
        sharding=sharding,
    )
    chat = uses_chat(task_named(options.task or str(options.data)), tokenizer, options.chat)
    return PromptedCausalLM(base), tokenizer, chat


def evaluated(
    options: TrainOptions,
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, list[Example]],
    folder: Path | None = None,
) -> list[Evaluation]:
    """Each task's examples, answered and graded as the resolved options say; written to a run's folder."""
    from ptmoe.evaluate import evaluate
    from ptmoe.fast.paths import is_sharded

    # A pass through a sharded base takes all processes: each answers everything.
    together = world_size() > 1 and not is_sharded(model.base_model)
    graded = distinct_tasks(held_out)
    return [
        evaluate(
            model,
            tokenizer,
            examples,
            task=graded[name],
            split=evaluation_split(options),
            score=options.score,
            batch_size=options.eval_batch_size,
            max_new_tokens=options.max_new_tokens,
            max_length=options.max_length,
            chat=bool(options.chat),
            folder=folder if together or rank() == 0 else None,
            overwrite=True,
            together=together,
        )
        for name, examples in held_out.items()
    ]


def run_folder(options: TrainOptions, resume: bool) -> Path:
    """The run's folder, checked but not created: by default a new one under `runs/`.

    Raises:
        PtmoeError: it holds a run already, or none to resume.
    """
    if options.output_dir is None:
        if resume:
            raise PtmoeError("--resume needs the run: give its --output-dir")
        if world_size() > 1:
            raise PtmoeError(f"{world_size()} processes write one run: name its folder with --output-dir")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        return Path("runs") / f"{options.method.get('name', DEFAULT_METHOD).replace(':', '-')}-{stamp}"
    folder = Path(options.output_dir)
    check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise PtmoeError(f"{folder} is a file: name a folder for the run")
    held = [name for name in RUN_FILES if (folder / name).exists()]
    held += [CHECKPOINTS_FOLDER] if has_checkpoints(folder) else []  # the folder alone is of a run that was refused
    if held and not resume:
        raise PtmoeError(
            f"{folder} already holds a run ({', '.join(held)}): choose another --output-dir, or continue it with "
            "--resume"
        )
    return folder


def _trainer(
    model: PromptedCausalLM,
    rows: TokenRows,
    options: TrainOptions,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> PromptTrainer:
    """
    Raises:
        PtmoeError: what `transformers` refuses only now that it has the data.
    """
    from transformers import PrinterCallback

    from ptmoe.train.batches import TokenBatches
    from ptmoe.train.callbacks import MetricsFile
    from ptmoe.train.data import collate
    from ptmoe.train.trainer import PromptTrainer

    check_targets(options, model)
    batches, own = None, {}
    if options.tokens_per_batch is not None:
        lengths = rows.lengths + model.num_virtual_tokens
        given = options.trainer.get("data_seed")  # whose 0 is a seed
        seed = options.seed if given is None else given
        batches = TokenBatches(lengths, options.tokens_per_batch, padded=not model.can_pack(), seed=seed)
        # For what counts in rows: the routing's first examples come in batches that fit.
        own["per_device_train_batch_size"] = max(1, options.tokens_per_batch // int(lengths.max()))
    elif options.trainer.get("dataloader_drop_last") and len(rows) < options.per_device_train_batch_size * world_size():
        raise PtmoeError(f"{len(rows):,} examples fill no batch, and dataloader_drop_last leaves out what does not")
    try:
        arguments = training_arguments(options, model.method_config, folder / CHECKPOINTS_FOLDER, **own)
        trainer = PromptTrainer(
            model=model,
            args=on_one_device(arguments),
            train_dataset=rows,
            data_collator=collate,
            batches=batches,
            callbacks=[MetricsFile(folder / METRICS_FILE), *callbacks],
        )
        trainer.get_train_dataloader()  # refuses its own
    except PtmoeError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError, ConnectionError) as error:  # the last of the Hub
        raise PtmoeError(f"{REFUSED} {' '.join(str(error).split())}") from None
    if trainer.args.world_size != world_size():
        raise PtmoeError(ALONE.format(world_size()))
    trainer.remove_callback(PrinterCallback)  # the metrics go to the file and to `callbacks`
    return trainer
