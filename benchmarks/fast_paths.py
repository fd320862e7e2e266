"""What single fast paths save of a training step on a CPU: `python -m benchmarks.fast_paths [--rounds 7]`.

Forward and backward of pt-moe at the sketch's shape in float32, with each path left out in turn, in processor seconds
(those of all threads), which another program on the machine disturbs less than the time on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from unittest import mock

from benchmarks.cases import EQUAL, PT_MOE, STEP_ROWS
from benchmarks.lengths import sample
from benchmarks.parts.step import training_rows
from benchmarks.shapes import SHAPES
from ptmoe.models.attach import attach
from ptmoe.train.data import collate
from ptmoe.train.options import method_config

ALL = "all paths"
LEFT_OUT = {"last layer": "last_layer", "oneDNN": "onednn", "packing": "packing"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    shape = SHAPES["sketch"]
    model = attach(shape.build("float32", "cpu"), method_config(PT_MOE)).train()
    model.encoder.has_callback = True  # nothing is learned here
    print({name: obstacle or "taken" for name, obstacle in model.fast_paths().items()})
    for case, lengths in (("equal lengths", [EQUAL] * STEP_ROWS), ("passages", sample("passages", STEP_ROWS, 0))):
        batch = collate(training_rows(lengths, shape.vocabulary))
        taken: dict[str, list[float]] = {name: [] for name in (ALL, *LEFT_OUT)}
        for number in range(rounds + 1):
            for name, seconds in taken.items():
                path = LEFT_OUT.get(name)
                model.packing = False if path == "packing" else None
                in_use = "left out" if path == "last_layer" else None
                torch_alone = mock.patch("ptmoe.fast.paths.use_onednn", return_value=nullcontext())
                with (
                    torch_alone if path == "onednn" else nullcontext(),
                    mock.patch("ptmoe.fast.paths.last_layer_in_use", return_value=in_use),
                ):
                    started = time.process_time()
                    model(**batch).loss.backward()
                    if number:  # the first round warms up
                        seconds.append(time.process_time() - started)
        middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
        print(f"{case}: {middle[ALL]:.2f} processor seconds with all paths")
        for name in LEFT_OUT:
            saved = [1 - whole / less for whole, less in zip(taken[ALL], taken[name], strict=True)]
            print(f"  {name}: {middle[name]:.2f} without; saves {100 * statistics.median(saved):.1f} %")


if __name__ == "__main__":
    main()
