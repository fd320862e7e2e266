"""What a second process gives: the same training and evaluation by one process on one core, and by two on two.

    python -m benchmarks.processes

The same global batches: one process accumulates two. Rounds are in turns; the ratio is of the medians. At least 1.6 is
wanted of the training.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median


def seconds(count: int, folder: Path, chosen: argparse.Namespace) -> tuple[float, float]:
    """Of the training, and of the evaluation."""
    command = f"train --model {chosen.model} --task {chosen.task} --method {chosen.method} --max-steps {chosen.steps} "
    command += f"--batch-size {chosen.rows} --gradient-accumulation-steps {2 // count} "
    command += f"--eval-examples {chosen.examples} --output-dir {folder} "
    command += f"--launch {count}" if count > 1 else ""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "ptmoe", *command.split()], env=environment, check=True, stdout=sys.stderr)
    evaluated = [json.loads(path.read_text())["seconds"] for path in (folder / "eval").glob("*.json")]
    return json.loads((folder / "result.json").read_text())["train_seconds"], sum(evaluated)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--task", default="nano/mixed")
    parser.add_argument("--method", default="pt-moe")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="of a process' batch")
    parser.add_argument("--examples", type=int, default=400, help="that are evaluated")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    taken: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.rounds):
            for count in taken:
                taken[count].append(seconds(count, Path(folder) / f"{number}-{count}", chosen))
                print(f"round {number + 1}, {count} process(es): training %.1f s, evaluation %.1f s" % taken[count][-1])
    for index, what in enumerate(("training", "evaluation")):
        one, two = (median(pair[index] for pair in taken[count]) for count in (1, 2))
        print(f"{what}: {one:.1f} s by one process, {two:.1f} s by two: {one / two:.2f} × the throughput")


if __name__ == "__main__":
    main()
