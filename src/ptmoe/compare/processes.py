"""Several cells at once: processes that each work through one cell after another, and may die without harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

from ptmoe.errors import PtmoeError
from ptmoe.train.options import TrainOptions
from ptmoe.train.steps import Progress


class Processes:
    """As many worker processes as are asked for at a time, started when needed and used again.

    Args:
        jobs: cells at once; each process gets its share of the cores.
        log: a file for what they print.
    """

    command = (sys.executable, "-m", "ptmoe.compare.cell")

    def __init__(self, jobs: int, log: Path) -> None:
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.log = log
        self.idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self.alive: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.starting = Lock()  # so that none is started while all are ended

    def run(self, options: TrainOptions, progress: Progress, say: Callable[[str], None]) -> int:
        """As `ptmoe.compare.cell.run_cell`, in a process; may be called from several threads.

        Raises:
            PtmoeError: the cell failed, or its process died.
        """
        try:
            process = self.idle.get_nowait()
        except Empty:
            process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(options.model_dump()) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                said = json.loads(line)
                if "step" in said:
                    progress(said["step"], said["steps"], said["loss"])
                elif "say" in said:
                    say(said["say"])
                else:
                    self.idle.put(process)
                    if "error" in said:
                        raise PtmoeError(said["error"])
                    return int(said["trainable"])
        except BrokenPipeError:
            pass  # it died while it was idle
        raise PtmoeError(f"its process {_end(process.wait())}; {self.log} has what it printed last")

    def stop(self) -> None:
        """End all of them, whatever they are doing."""
        with self.starting:
            self.stopped = True
            for process in self.alive:
                process.kill()
        for process in self.alive:
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        threads = str(self.threads)
        with self.starting, self.log.open("a") as log:
            if self.stopped:
                raise PtmoeError("the comparison was stopped")
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
            self.alive.add(process)
        return process


def _end(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
