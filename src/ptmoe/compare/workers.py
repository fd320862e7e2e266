"""Cells in worker processes (`python -m ptmoe.compare.workers`), each of which may die without harm to the others.

A worker reads a line for each cell, the run's options as JSON, and answers with lines:

    {"step": 10, "steps": 300, "loss": 0.41}     {"message": "…"}     and at last {"trainable": 3840} or {"error": "…"}
"""

from __future__ import annotations

import gc
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import REMEDIES, PtmoeError, system_error
from ptmoe.runs.folders import CHECKPOINTS_FOLDER
from ptmoe.train.options import BASE, TrainOptions

if TYPE_CHECKING:
    from ptmoe.train.steps import Progress

GRACE_SECONDS = 30.0  # for the step that a cell is in, and its checkpoint


def run_cell(options: TrainOptions, progress: Progress, say: Callable[[str], None]) -> int:
    """Train and evaluate; returns the number of trainable parameters. The model is released.

    Training resumes from a checkpoint that an interrupted run left in the folder, where it can. Checkpoints that
    the plan did not ask for are gone in the end.
    """
    import torch

    from ptmoe.models.bases import quiet
    from ptmoe.train.interruption import InterruptedRunError
    from ptmoe.train.recipe import evaluate_base

    quiet()
    folder = Path(str(options.output_dir))
    try:
        if options.method["name"] == BASE:
            shutil.rmtree(folder, ignore_errors=True)
            evaluate_base(options, say=say)
            return 0
        trainable = _train(options, folder, progress, say)
        if "save_strategy" not in options.trainer:
            shutil.rmtree(folder / CHECKPOINTS_FOLDER, ignore_errors=True)
        return trainable
    except InterruptedRunError as error:  # the comparison ends, not this cell alone
        raise KeyboardInterrupt from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train(options: TrainOptions, folder: Path, progress: Progress, say: Callable[[str], None]) -> int:
    from ptmoe.train.callbacks import OnBegin
    from ptmoe.train.recipe import train
    from ptmoe.train.resume import has_checkpoints
    from ptmoe.train.steps import StepsCallback

    begun = threading.Event()
    callbacks = [StepsCallback(progress), OnBegin(begun.set)]
    if has_checkpoints(folder):
        try:
            return train(options, resume=True, callbacks=callbacks, say=say).result.trainable_parameters
        except PtmoeError as error:
            if begun.is_set():
                raise
            refusal = str(error)  # the error itself would keep the model
        say(f"starts over: {refusal}")
    shutil.rmtree(folder, ignore_errors=True)
    return train(options, callbacks=callbacks, say=say).result.trainable_parameters


def error_message(error: Exception) -> str:
    """What a failed cell is listed with; the traceback of an unforeseen error goes to standard error."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        error = system_error(error)
    if isinstance(error, PtmoeError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


class Workers:
    """A worker process for each thread that runs cells, started when needed and used again.

    Args:
        jobs: cells at once; each process gets its share of the cores.
        log: a file for what they print.
    """

    command = (sys.executable, "-m", "ptmoe.compare.workers")

    def __init__(self, jobs: int, log: Path) -> None:
        self.threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.log = log
        self.own = threading.local()
        self.alive: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.starting = threading.Lock()  # so that none is started while all are ended

    def run(self, options: TrainOptions, progress: Progress, say: Callable[[str], None]) -> int:
        """As `run_cell`, in this thread's process.

        Raises:
            PtmoeError: the cell failed, or its process died.
        """
        process: subprocess.Popen[str] | None = getattr(self.own, "process", None)
        if process is None or process.poll() is not None:
            process = self.own.process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it died just now
            process.stdin.write(json.dumps(options.model_dump()) + "\n")
            for line in process.stdout:
                match json.loads(line):
                    case {"step": done, "steps": steps, "loss": loss}:
                        progress(done, steps, loss)
                    case {"message": text}:
                        say(text)
                    case {"error": error}:
                        raise PtmoeError(error)
                    case {"trainable": trainable}:
                        return int(trainable)
        status = process.wait()
        end = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise PtmoeError(f"its process {end}; {self.log} has what it printed last")

    def stop(self) -> None:
        """End all of them; one that trains writes a checkpoint first, if that does not take long."""
        with self.starting:
            self.stopped = True
            for process in self.alive:
                process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for process in self.alive:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also where an interrupt does not wait
            for process in self.alive:
                process.kill()
            for process in self.alive:
                process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with self.starting, self.log.open("a") as log:
            if self.stopped:
                raise PtmoeError("the comparison was stopped")
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,  # each line is sent at once
                env=os.environ | {"OMP_NUM_THREADS": self.threads, "MKL_NUM_THREADS": self.threads},
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
            self.alive.add(process)
        return process


def main() -> None:
    gc.set_threshold(10_000, 10, 10)  # as in the command
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    def progress(done: int, steps: int, loss: float | None) -> None:
        answer(step=done, steps=steps, loss=loss)

    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()

    def receive() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(1)  # the comparison has ended, however it did: nobody waits for this cell

    threading.Thread(target=receive, daemon=True).start()
    while True:
        line = tasks.get()
        try:
            answer(trainable=run_cell(TrainOptions(**json.loads(line)), progress, lambda text: answer(message=text)))
        except Exception as error:
            answer(error=error_message(error))


if __name__ == "__main__":
    main()
