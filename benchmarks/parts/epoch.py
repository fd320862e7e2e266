"""An epoch of training, from the beginning of the first step to the end of the last: ptmoe, `transformers.Trainer` with
peft, and trl's `SFTTrainer` with peft. The same examples in the same order, eight a step, right-padded per batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.lengths import Lengths
from benchmarks.machine import Setting, now
from benchmarks.parts.step import SHORT, training_rows
from benchmarks.worker import Round
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_tokenizer
from ptmoe.train.data import collate
from ptmoe.train.options import method_config
from ptmoe.train.routing import RoutingCallback
from ptmoe.train.trainer import PromptTrainer

Rows = list[dict[str, list[int]]]


class Clock(TrainerCallback):
    """Notes when the first step begins and the last one ends."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.began or now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = now()


def _measured(setting: Setting, lengths: Lengths, trainer: Callable[[Rows, str, Clock], Trainer]) -> Round:
    """Rounds of a new trainer on the same model."""

    def measure(brief: bool) -> dict[str, Any]:
        clock = Clock()
        training = training_rows([SHORT] * 8 if brief else lengths, setting.vocabulary)
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(training, folder, clock)
            started = now()
            made.train()
        return {"seconds": clock.ended - clock.began, "before_first_step_seconds": clock.began - started}

    return measure


def _arguments(folder: str, batch_size: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",  # the lengths are shuffled already, alike for all
        "learning_rate": 1e-3,
        "bf16": False,  # computed in the base's own dtype; trl would use autocast
        "gradient_checkpointing": False,  # trl's default is True
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _data(training: Rows, folder: str, batch_size: int) -> dict[str, Any]:
    """What ptmoe's trainer and `transformers`' are given alike."""
    arguments = TrainingArguments(**_arguments(folder, batch_size))
    return {"args": arguments, "train_dataset": training, "data_collator": collate}


def ptmoe(setting: Setting, lengths: Lengths, batch_size: int, method: dict[str, Any]) -> Round:
    """As `ptmoe train` does."""
    model = attach(setting.base(), method_config(method))

    def trainer(training: Rows, folder: str, clock: Clock) -> Trainer:
        callbacks = [RoutingCallback(), clock]
        return PromptTrainer(model=model, callbacks=callbacks, **_data(training, folder, batch_size))

    return _measured(setting, lengths, trainer)


def peft(setting: Setting, lengths: Lengths, batch_size: int, method: str, virtual: int) -> Round:
    """`transformers.Trainer` with peft's model, its own forward and loss."""
    config = {
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj", "v_proj"]),
    }[method]
    model = get_peft_model(setting.base(), config)

    def trainer(training: Rows, folder: str, clock: Clock) -> Trainer:
        return Trainer(model=model, callbacks=[clock], **_data(training, folder, batch_size))

    return _measured(setting, lengths, trainer)


def trl(setting: Setting, lengths: Lengths, batch_size: int, virtual: int) -> Round:
    """trl's `SFTTrainer` with its own collator, loss and fused head, on tokenised examples with a completion mask."""
    from trl import SFTConfig, SFTTrainer

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    model = get_peft_model(setting.base(), config)
    tokenizer, _ = load_tokenizer("nano")  # SFTTrainer asks for one, for its padding token alone

    def trainer(training: Rows, folder: str, clock: Clock) -> Trainer:
        masked = [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in training
        ]
        return SFTTrainer(
            model=model,
            args=SFTConfig(**_arguments(folder, batch_size), max_length=None, completion_only_loss=True),
            train_dataset=Dataset.from_list(masked),
            processing_class=tokenizer,
            callbacks=[clock],
        )

    return _measured(setting, lengths, trainer)
