"""A process that measures one system, a round whenever it is told to.

    python -m benchmarks.worker '{"run": "step.training", "shape": "sketch", "dtype": "float32", …}'

It answers in JSON lines: one when the system is built and warm, one for each line that it reads. A process that waits
for its turn sleeps, so every round has the machine to itself.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from ptmoe.models.bases import quiet

# A round; with True a brief one, on short inputs, that only warms up.
Round = Callable[[bool], dict[str, Any]]


def built(request: dict[str, Any]) -> tuple[machine.Setting, Round]:
    """The system of a request: what `run` names in `benchmarks.parts`, called with all but its own keys."""
    options = dict(request)
    setting = machine.Setting(options.pop("shape"), options.pop("dtype"))
    module, function = options.pop("run").split(".")
    build: Callable[..., Round] = getattr(importlib.import_module(f"benchmarks.parts.{module}"), function)
    return setting, build(setting, **options)


def main() -> None:
    request = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    quiet()
    warnings.simplefilter("ignore")

    def answer(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    warm_up = request.pop("warm_up")
    setting, measure = built(request)
    if warm_up != "none":
        measure(warm_up == "brief")
    answer({"ready": True})
    for _ in sys.stdin:
        result = measure(False)
        answer({**result, "peak_bytes": machine.peak(), "base_bytes": setting.held})


if __name__ == "__main__":
    main()
