"""SIGINT and SIGTERM during training: the step is finished, a checkpoint is written, and the process says so."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.runs.folders import ADAPTER_FOLDER, CHECKPOINTS_FOLDER
from ptmoe.train.trainer import DivergedError, PromptTrainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(PtmoeError):
    """A signal ended training. `status` is what shells and schedulers expect of it: 128 and the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


class Interruption(TrainerCallback):
    """Within it a first SIGINT or SIGTERM ends training after the present step; a second one acts at once.

    Attributes:
        number: of the signal that has come, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # the only one that may
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if args.world_size > 1:  # all processes stop at the same step, or some would wait for the others for ever
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        if self.number:
            control.should_save = control.should_training_stop = True
        return control


def fit_until_interrupted(trainer: PromptTrainer, folder: Path, checkpoint: Path | None) -> None:
    """Train in a run's folder, and save the adapter, even if the loss diverged and there is an earlier one to save."""
    try:
        with Interruption() as interruption:
            trainer.add_callback(interruption)
            if checkpoint is None or not trainer.load_finished(checkpoint):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        if error.restored is not None:
            trainer.model.save_pretrained(folder / ADAPTER_FOLDER)
            error.args = (f"{error}; saved in {folder / ADAPTER_FOLDER}",)
        raise
    step, checkpoints = trainer.state.global_step, folder / CHECKPOINTS_FOLDER
    # A run that keeps no checkpoints has none where a signal comes after its last step.
    kept = interruption.number and (checkpoints / f"checkpoint-{step}").exists()
    trainer.model.eval()
    if not kept and trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / ADAPTER_FOLDER)
    if interruption.number:
        place, command = checkpoints, f"continue it with `ptmoe train --resume --output-dir {folder}`"
        if not kept:
            place, command = folder / ADAPTER_FOLDER, "evaluate it with `ptmoe eval`"
        name = signal.Signals(interruption.number).name
        raise InterruptedRunError(
            f"{name} ended training at step {step}, saved in {place}: {command}", interruption.number
        )
