"""Callbacks of a training run: what happens when it begins, and its metrics as a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from ptmoe.runs.records import LogLine, append_line, write_lines


def logged_until(path: Path, step: int) -> tuple[list[LogLine], float]:
    """The lines of `metrics.jsonl` up to a checkpoint's step, and the seconds that training had taken by the last."""
    lines = LogLine.read_lines(path) if step and path.exists() else []
    kept = [line for line in lines if (line.step or 0) <= step]
    return kept, kept[-1].seconds or 0.0 if kept else 0.0


class OnBegin(TrainerCallback):
    """Calls a function when training begins, after the checkpoint of a resumed run has been read: a run that cannot go
    on changes no file."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.function()


class MetricsFile(TrainerCallback):
    """Writes each log as a line of `metrics.jsonl`: `step`, `seconds` since the start, and what was logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = 0.0  # seconds of the runs that this run resumes

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept, self.before = logged_until(self.path, state.global_step)
        write_lines(self.path, kept)
        self.started = time.monotonic()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in logs:
            seconds = round(self.before + time.monotonic() - self.started, 3)
            append_line(self.path, LogLine(**{"step": state.global_step, "seconds": seconds, **logs}))
