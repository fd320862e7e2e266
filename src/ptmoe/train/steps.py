"""The progress of a training run, for display."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerState

Progress = Callable[[int, int, float | None], None]  # steps done, steps in all, the last loss


class StepsCallback(TrainerCallback):
    """Reports the steps done and the last loss, at the start, after each step and with each log."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.loss: float | None = None

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)
        self._report(args, state, control)

    def _report(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, self.loss)

    on_train_begin = on_step_end = _report
