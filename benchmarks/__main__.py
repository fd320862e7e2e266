"""Measure speed and memory of ptmoe beside its peers, and write RESULTS.md.

    python -m benchmarks                                   # everything that this machine measures
    python -m benchmarks step epoch --shape sketch --dtype float32
    python -m benchmarks --resume                          # continue an interrupted run
    python -m benchmarks --quick                           # seconds: shows that the command works, measures nothing
    python -m benchmarks --render                          # RESULTS.md anew from what was recorded

On a machine with a GPU that GPU is measured, else the CPU. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from benchmarks.cases import PARTS, QUICK_SHAPE, cases
from benchmarks.interleave import ROOT, measure
from benchmarks.report import DEVICES, read, render
from benchmarks.serving import section
from benchmarks.shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="of the base; by default sketch and llama-1b")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="by default each shape's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume", action="store_true", help="leave out what was measured at this commit")
    parser.add_argument("--quick", action="store_true", help="one round of little work on a tiny base, printed only")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help="by default benchmarks/RESULTS.md; results/ is beside it")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if QUICK_SHAPE in (chosen.shape or ()) and not chosen.quick:
        parser.error(f"--shape {QUICK_SHAPE} is for --quick: its times say nothing")
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: needs at least 1")
    with tempfile.TemporaryDirectory() as folder:
        output = chosen.output or (Path(folder) if chosen.quick else ROOT / "benchmarks") / "RESULTS.md"
        if not chosen.render:
            run(chosen, output.parent / "results")
        page = render({device: read(output.parent / "results" / f"{device}.jsonl") for device in DEVICES})
        page = f"{page.rstrip()}\n\n{section(output.parent / 'results' / 'serving.jsonl').lstrip()}"
        output.write_text(page)
        if chosen.quick:
            print(page)


def run(chosen: argparse.Namespace, results: Path) -> None:
    """Measure, and append each finished case to the results of this machine's device."""
    described = subprocess.run(
        [sys.executable, "-m", "benchmarks.machine"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    environment = json.loads(described.stdout)
    device = environment.pop("device")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{device}.jsonl"
    done = {
        tuple(line[name] for name in ("part", "name", "shape", "dtype"))
        for line in read(path)
        if line["environment"]["commit"] == environment["commit"]
    }
    shapes = chosen.shape or ([QUICK_SHAPE] if chosen.quick else None)
    for case in cases(chosen.parts or PARTS, shapes, chosen.dtype, device, quick=chosen.quick):
        if chosen.resume and case.key in done:
            continue
        print(", ".join(filter(None, case.key)), flush=True)
        rounds, failures = measure(case, 1 if chosen.quick else chosen.rounds, lambda line: print(line, flush=True))
        line = {
            "part": case.part,
            "name": case.name,
            "shape": case.shape,
            "dtype": case.dtype,
            "device": device,
            "reference": case.reference,
            "date": date.today().isoformat(),
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "environment": environment,
            "systems": case.systems,
            "rounds": rounds,
            "failures": failures,
        }
        with path.open("a") as opened:
            opened.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
