"""What single fast paths save of a training step on a CPU: `python -m benchmarks.fast_paths [--rounds 7]`.

Forward and backward of pt-moe, and of pt, whose prompt all rows share, at the sketch's shape in float32, with each path
left out in turn, in processor seconds (those of all threads), which another program on the machine disturbs less than
the time on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack, nullcontext
from statistics import fmean
from unittest import mock

from benchmarks.cases import EQUAL, PT, PT_MOE, STEP_ROWS
from benchmarks.lengths import Lengths, sample
from benchmarks.parts.step import training_rows
from benchmarks.shapes import SHAPES
from ptmoe.models.adapter_set import Prompts
from ptmoe.models.attach import attach
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.train.data import collate
from ptmoe.train.options import method_config

SENTENCE = [24, 2]  # tokens of a headline or an opinion, and of its label
ALL = "all paths"
# By method, with the option of the loss or the name in `fast_paths()`.
LEFT_OUT = {
    "pt-moe": (PT_MOE, {"last layer": "last_layer", "oneDNN": "onednn", "packing": "packing"}),
    "pt": (PT, {"shared prompt": "shared"}),
}
CASES = {
    "equal lengths": [EQUAL] * STEP_ROWS,
    "passages": sample("passages", STEP_ROWS, 0),
    "word problems": sample("gsm8k", STEP_ROWS, 0),
    "sentences": [SENTENCE] * STEP_ROWS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    base = SHAPES["sketch"].build("float32", "cpu")
    for method, (config, paths) in LEFT_OUT.items():
        model = attach(base, method_config(config)).train()
        model.encoder.has_callback = True  # nothing is learned here
        print(f"{method}, {model.num_virtual_tokens} virtual tokens:")
        print(" ", {name: obstacle or "taken" for name, obstacle in model.fast_paths().items()})
        for case, lengths in CASES.items():
            compare(model, lengths, paths, rounds, f"{case}, {fmean(map(sum, lengths)):.0f} tokens")


def compare(model: PromptedCausalLM, lengths: Lengths, paths: dict[str, str], rounds: int, case: str) -> None:
    batch = collate(training_rows(lengths, SHAPES["sketch"].vocabulary))
    taken: dict[str, list[float]] = {name: [] for name in (ALL, *paths)}
    for number in range(rounds + 1):
        for name, seconds in taken.items():
            path = paths.get(name)
            model.packing = False if path == "packing" else None
            in_use = "left out" if path == "last_layer" else None
            with ExitStack() as changes:
                changes.enter_context(mock.patch("ptmoe.fast.paths.last_layer_in_use", return_value=in_use))
                if path == "onednn":
                    changes.enter_context(mock.patch("ptmoe.fast.paths.use_onednn", return_value=nullcontext()))
                if path == "shared":
                    changes.enter_context(mock.patch.object(Prompts, "shared", False))
                started = time.process_time()
                model(**batch).loss.backward()
                if number:  # the first round warms up
                    seconds.append(time.process_time() - started)
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    print(f"  {case}: {middle[ALL]:.2f} processor seconds with all paths")
    for name in paths:
        saved = [1 - whole / less for whole, less in zip(taken[ALL], taken[name], strict=True)]
        print(f"    {name}: {middle[name]:.2f} without; saves {100 * statistics.median(saved):.1f} %")


if __name__ == "__main__":
    main()
