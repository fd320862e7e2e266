"""One cell, in this process or in a worker process for several (`python -m ptmoe.compare.cell`).

A worker reads a line for each cell, the run's options as JSON, and answers with lines:

    {"step": 10, "steps": 300, "loss": 0.41}     {"say": "…"}     and at last {"trainable": 3840} or {"error": "…"}
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.train.options import BASE, TrainOptions
from ptmoe.train.steps import Progress, StepsCallback


def run_cell(options: TrainOptions, progress: Progress, say: Callable[[str], None]) -> int:
    """Train and evaluate; returns the number of trainable parameters. The model is released."""
    import torch

    from ptmoe.models.bases import quiet
    from ptmoe.train.recipe import evaluate_base, train

    quiet()
    try:
        if options.method["name"] == BASE:
            evaluate_base(options, say=say)
            return 0
        trained = train(options, callbacks=[StepsCallback(progress)], say=say)
        return int(trained.result.trainable_parameters)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def error_message(error: Exception) -> str:
    """What a failed cell is listed with; the traceback of an unforeseen error goes to standard error."""
    if isinstance(error, PtmoeError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    for line in sys.stdin:
        try:
            trainable = run_cell(
                TrainOptions(**json.loads(line)),
                lambda step, steps, loss: answer(step=step, steps=steps, loss=loss),
                lambda said: answer(say=said),
            )
        except Exception as error:
            answer(error=error_message(error))
        else:
            answer(trainable=trainable)


if __name__ == "__main__":
    main()
