"""One cell, in this process or in a process that works through several (`python -m ptmoe.compare.cell`).

The process reads a line for each cell, the run's options as JSON, and answers with lines while it works:

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
    """Train and evaluate; returns the number of trainable parameters. Nothing of the model is kept."""
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


def in_words(error: Exception) -> str:
    """What a failed cell is listed with; the way to an unforeseen error goes to standard error."""
    if isinstance(error, PtmoeError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def main() -> None:
    # Libraries that print must not speak between the answers.
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
            answer(error=in_words(error))
        else:
            answer(trainable=trainable)


if __name__ == "__main__":
    main()
