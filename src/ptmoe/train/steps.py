"""The progress of a training run, for whoever displays it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Progress = Callable[[int, int, float | None], None]  # steps done, steps in all, the last loss


class StepsCallback(TrainerCallback):
    """Reports the steps done and the last loss, at the start, after each step and with each log."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        self._report(state)

    def _report(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.loss)
