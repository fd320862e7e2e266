"""This checkout's ptmoe beside another's, such as that of an earlier commit: the same cases, in turns, in one run.

    git worktree add ../before COMMIT
    python -m benchmarks.beside ../before step epoch --shape sketch --rounds 10

Prints the seconds of both and, round by round, this one's over the other's: the median, the least and the greatest. The
other's `benchmarks` measures it, so the case must be there as well, on the same libraries. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks.cases import PARTS, Case, cases
from benchmarks.interleave import ROOT, Worker
from benchmarks.report import Figure
from benchmarks.shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.beside", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--shape", nargs="+", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    for case in cases(chosen.parts, chosen.shape, None, chosen.device):
        for system in (name for name in case.systems if name.startswith("ptmoe")):
            here, there = compare(case, system, chosen.other.resolve(), chosen.rounds)
            ratio = Figure.of(one / other for one, other in zip(here, there, strict=True))
            print(
                f"{', '.join(filter(None, case.key))}, {system}: {Figure.of(here).text()} s beside "
                f"{Figure.of(there).text()} s, {ratio.text()} times as long",
                flush=True,
            )


def compare(case: Case, system: str, other: Path, rounds: int) -> tuple[list[float], list[float]]:
    """The seconds of each round, of this checkout and of the other; every second round the other is first."""
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Worker(case.request(system), root))) for root in (ROOT, other)]
        seconds: tuple[list[float], list[float]] = ([], [])
        for number in range(rounds):
            for index in (0, 1) if number % 2 else (1, 0):
                seconds[index].append(workers[index].round()["seconds"])
    return seconds


if __name__ == "__main__":
    main()
