"""`transformers.Trainer` for adapters: checkpoints without pickles, batches by tokens, smaller parts where memory is
short, and a stop when the loss diverges."""

import json
import math
import random
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import rotate_checkpoints

from ptmoe.adapters.folder import read_adapter
from ptmoe.errors import DIVERGED, PtmoeError
from ptmoe.fast.paths import is_sharded
from ptmoe.files import naming, save_tensors
from ptmoe.methods.routing import RoutedEncoder
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.train.batches import Blanking, EvenBatches, TokenBatches, WithBlanks
from ptmoe.train.callbacks import OnBegin
from ptmoe.train.checkpoints import PARTIAL, RANDOM_STATE, fault, numbered, publish, seal
from ptmoe.train.memory import Parts
from ptmoe.train.optimizer import SCHEDULER, load_state, save_state, settle, updates_in_backward

TRAINING_STATE = "training_state.safetensors"
SCALER = "scaler.json"


class DivergedError(PtmoeError):
    """The loss or the weights became NaN or infinite.

    Attributes:
        step: the training step at which they did.
        restored: a description of what the model holds now: the adapter of the last finite loss or, with a method that
            trains the base's own weights, those of a checkpoint. None if there was nothing to restore.
    """

    def __init__(self, what: str, step: int, restored: str | None) -> None:
        super().__init__(
            f"{what} at step {step}, and no checkpoint holds earlier weights, so nothing was saved: lower "
            "--learning-rate, train in float32, or lower --save-steps"
            if restored is None
            else f"{what} at step {step}; stopped with {restored}: lower --learning-rate, or train in float32"
        )
        self.step = step
        self.restored = restored


class PromptTrainer(Trainer):
    """`transformers.Trainer` with its own checkpoints: the adapter folder and the states of the optimizer, the
    scheduler and the random generators, in safetensors and JSON.

    Several processes take the batches in turns. Where one is left without a batch in an epoch's last step it computes
    an example that counts for nothing, so that they train as one process does that accumulates the same batches. A base
    may be sharded over them (`ptmoe.models.sharding`); the adapter is whole in each.

    Args:
        *arguments: of `Trainer`.
        batches: the batches to read the training set in, instead of `per_device_train_batch_size` random examples each.
        **options: of `Trainer`.

    Raises:
        PtmoeError: `accelerate` would shard the adapter.
    """

    model: PromptedCausalLM
    optimizer: Any

    def __init__(self, *arguments: Any, batches: TokenBatches | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise PtmoeError(
                "FSDP and DeepSpeed would shard the adapter, and save it in pickles: use `ptmoe train`, which gives "
                "them the base alone, or load the base with load_base(…, sharding=…) and leave accelerate without them"
            )
        base = self.model.base_model
        if is_sharded(base):
            # Each process has another part of a tensor: DDP must not make them equal.
            parts = [f"base_model.{name}" for name, _ in base.named_parameters()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, parts)
        self.batches = batches
        self.callback_handler.callbacks.insert(0, _Settled(self))  # before what else ends the training of the weights
        self.add_callback(_Epochs(self))
        self._grouping = torch.Generator()  # of rows by length; the global one is another in resumed runs and processes
        self._last_good: list[Tensor] = []  # values of the trained parameters
        self._saving = False
        self.changed = False  # resumed with other options than the checkpoint's
        self._parts = Parts()

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self._grouping
        return sampler

    def begin_epoch(self, epoch: int) -> None:
        """Decide in which order it reads the training set."""
        if self.batches is not None:
            self.batches.set_epoch(epoch)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._grouping.manual_seed(seed + epoch)

    def get_train_dataloader(self) -> DataLoader[Any]:
        data, batches = cast("Dataset[Any]", self.train_dataset), cast(Any, self.batches)
        if batches is None and (self.args.world_size == 1 or isinstance(data, IterableDataset)):
            return cast("DataLoader[Any]", super().get_train_dataloader())
        if batches is None:
            batches = BatchSampler(
                self._get_train_sampler(data), self.args.train_batch_size, self.args.dataloader_drop_last
            )
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        if len(batches) % self.args.world_size:
            batches, data, collate = EvenBatches(batches, self.args.world_size), WithBlanks(data), Blanking(collate)
        names = ["num_workers", "pin_memory", "persistent_workers", "prefetch_factor"]
        names += ["multiprocessing_context", "in_order"]
        options: dict[str, Any] = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collate, **options)
        before, self.accelerator.even_batches = self.accelerator.even_batches, False  # True would count examples twice
        try:
            return cast("DataLoader[Any]", self.accelerator.prepare(loader))
        finally:
            self.accelerator.even_batches = before

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self.model.encoder.training_log()
        super().log(logs, start_time)

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = self.model.encoder.optimizer(self.args.learning_rate, self.args.weight_decay)
        return cast(torch.optim.Optimizer, super().create_optimizer(*arguments))

    # -- divergence ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        # Before the step, within which some optimizers update the weights already.
        kept = [] if self.model.encoder.config.trains_base else [part.detach().clone() for part in self._trained()]
        loss = self._in_parts(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise DivergedError(f"{DIVERGED[0]} {loss.item()}", self.state.global_step + 1, self._restore())
        self._last_good = kept
        return loss

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.encoder.parameters() if parameter.requires_grad]

    def check_weights(self) -> None:
        """Before they are saved: no loss has shown yet what the last update has made of them.

        Raises:
            DivergedError: they are not finite.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self._trained()):
            raise DivergedError(f"{DIVERGED[1]} NaN or infinite", self.state.global_step, self._restore())

    @torch.no_grad()
    def _restore(self) -> str | None:
        """Undo the updates since the last finite loss or, with a method that trains the base's own weights, since the
        newest checkpoint.

        Returns:
            A description of what the model holds now; None if there is nothing to go back to.
        """
        if not self.model.encoder.config.trains_base:
            if self._last_good:
                for parameter, value in zip(self._trained(), self._last_good, strict=True):
                    parameter.copy_(value)
            return "the adapter as it was before"
        for step, folder in numbered(Path(self.args.output_dir)):
            if step <= self.state.global_step:
                with suppress(PtmoeError):  # the update before it may have broken the weights
                    self._load_from_checkpoint(str(folder))
                    return f"the weights of {folder}"
        return None

    # -- memory --------------------------------------------------------------------------------------------------------

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> Tensor:
        """A training step, in twice as many parts whenever memory cannot hold it. The loss is over the supervised
        tokens of the global batch, so the gradients of the parts add up to the same."""
        alone = self.args.world_size == 1  # other processes would wait for the second part
        if num_items is None or not alone or updates_in_backward(self.args.optim):  # which cannot start a batch again
            return cast(Tensor, super().training_step(model, inputs, num_items))
        trainable = self._trained()
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in trainable]

        def undo() -> None:
            for parameter, gradient in zip(trainable, before, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()

        step = partial(super().training_step, model, num_items_in_batch=num_items)
        return torch.stack(self._parts.computed(inputs, step, undo)).sum()

    # -- checkpoints without pickles -----------------------------------------------------------------------------------

    def load_finished(self, checkpoint: Path) -> bool:
        """Load a checkpoint of the last step, from which `Trainer` would take one step more; False, and nothing is
        loaded, where steps are left."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < (self._steps() if self.changed else state.max_steps):
            return False
        self.state = state
        self._load_from_checkpoint(str(checkpoint))
        if isinstance(self.model.encoder, RoutedEncoder):
            self.model.encoder.finish_training()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, OnBegin):
                callback.function()
        return True

    def _steps(self) -> int:
        """How many the options ask for."""
        batches = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
        asked: int = self.args.max_steps
        return asked if asked > 0 else math.ceil(self.args.num_train_epochs * batches)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        partial, name = folder / PARTIAL, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # of a save that was interrupted
        self.accelerator.wait_for_everyone()
        settle(self.optimizer)
        self.check_weights()
        self._saving = True
        try:
            with naming(folder / name):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._record_best(folder, partial / name)
                    seal(partial / name)
                    publish(partial / name, folder / name)
        finally:
            self._saving = False
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(output_dir=str(folder), save_total_limit=limit, best_model_checkpoint=best)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # uploads go on in the background, when the folder has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _record_best(self, folder: Path, partial: Path) -> None:
        """`Trainer` has recorded the best checkpoint where it is written, not where it will be."""
        if self.state.best_global_step:
            best = folder / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.exists() or best.name == partial.name else None
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))

    def _load_best_model(self) -> None:
        settle(self.optimizer)  # at the end of training it would take what is loaded for its own values
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._saving else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(folder)
        if self.processing_class is not None and not self._saving:  # a tokenizer is many times an adapter's size
            cast(Any, self.processing_class).save_pretrained(folder)
        # What the published form lacks: the coordinates in which the router is trained.
        if state := self.model.encoder.training_state():
            save_tensors({name: value.contiguous() for name, value in state.items()}, folder / TRAINING_STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        encoder = self.model.encoder
        saved = read_adapter(folder)
        if (reason := fault(folder)) is not None:
            raise PtmoeError(f"{folder} cannot be used: {reason}; take another checkpoint, or start again")
        if not self.changed:
            self.model.check_saved(saved.base, folder)
        saved.check(encoder)
        encoder.load_tensors(saved.tensors)
        if (folder / TRAINING_STATE).exists():
            encoder.load_training_state(load_file(folder / TRAINING_STATE, device=str(self.model.device)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.should_save:
            save_state(self.optimizer, self.lr_scheduler, self.args.optim, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / SCHEDULER).exists():
            raise PtmoeError(
                f"{checkpoint} lacks {SCHEDULER} and with it the step of the learning rate (save_only_model leaves it "
                "out, and other trainers write it in another form), so training cannot go on from it: start again, "
                "with another output_dir"
            )
        load_state(self.optimizer, self.lr_scheduler, Path(checkpoint), self.changed)

    def _save_scaler(self, output_dir: str) -> None:
        if self.args.should_save and (scaler := self.accelerator.scaler) is not None:
            (Path(output_dir) / SCALER).write_text(json.dumps(scaler.state_dict()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (file := Path(checkpoint) / SCALER).exists():
            self.accelerator.scaler.load_state_dict(json.loads(file.read_text()))

    def _save_rng_state(self, output_dir: str) -> None:
        state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._random_state_file(output_dir).write_text(json.dumps(state, default=lambda array: array.tolist()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The file of this process is missing where others have made the checkpoint, which takes `--force`.
        if checkpoint is None or not self._random_state_file(checkpoint).exists():
            return
        state = json.loads(self._random_state_file(checkpoint).read_text())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([torch.tensor(device, dtype=torch.uint8) for device in state["cuda"]])

    def _random_state_file(self, folder: str) -> Path:
        rank = f".{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / RANDOM_STATE.replace(".json", f"{rank}.json")


class _Epochs(TrainerCallback):
    """Passes the epoch on to what decides the order: `accelerate` wraps batches that several processes share, again
    in a resumed run, and does not pass it on."""

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.trainer.begin_epoch(int(state.epoch or 0))


class _Settled(TrainerCallback):
    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.trainer._last_good = []  # of an earlier training, whose end has folded them

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        settle(self.trainer.optimizer)
        self.trainer.check_weights()
