"""Systems measured in turns, A B A B …, each in a process of its own, so that what disturbs one disturbs all.

This side imports no torch: a process inherits its parent's size into its own high-water mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

ROOT = Path(__file__).parent.parent


class FailedError(Exception):
    """A system could not be measured."""


class Worker:
    """The process of one system, ready for a round, of this checkout or of another."""

    def __init__(self, request: dict[str, Any], root: Path = ROOT) -> None:
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(request)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(root / "src")},
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: its last words follow
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # it ends with its input; one that is still in a round is stopped
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.complaints.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.complaints.seek(0)
        last = (self.complaints.read().strip().splitlines() or ["nothing said"])[-1]
        raise FailedError(f"killed by signal {-status}" if status < 0 else last)


def measure(case: Case, rounds: int, say: Callable[[str], None]) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Every round of every system, and why those that failed did; a failed one takes no further part."""
    workers: dict[str, Worker] = {}
    results: dict[str, list[Any]] = {name: [] for name in case.systems}
    failures: dict[str, str] = {}
    try:
        for number in range(rounds):
            for name in case.systems:
                if name in failures:
                    continue
                try:
                    worker = workers.pop(name, None) or Worker(case.request(name))
                    workers[name] = worker  # it is closed with the others, whatever happens in its round
                    results[name].append(worker.round())
                    if not case.resident:
                        workers.pop(name).close()
                except FailedError as error:
                    failures[name] = str(error)
                    if name in workers:
                        workers.pop(name).close()
                    say(f"  {name}: failed, {error}")
                else:
                    taken = results[name][-1].get("seconds")
                    say(f"  round {number + 1}, {name}" + ("" if taken is None else f": {taken:.4g} s"))
    finally:
        for worker in workers.values():
            worker.close()
    return {name: made for name, made in results.items() if name not in failures}, failures
