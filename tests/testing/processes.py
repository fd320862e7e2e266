"""Processes that a launcher starts, and what they print."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# On CPUs, of which there are always two: a machine with one GPU has none for a second process.
HIDDEN = ("ACCELERATE_USE_CPU", "PTMOE_TEST_DEVICE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in HIDDEN} | {
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "OMP_NUM_THREADS": "1",
}


def torchrun(count: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]


def launched(*command: str) -> str:
    """What a command prints on its standard output."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-3000:]
    return done.stdout


class Launched:
    """A launcher's command, and what its processes print."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        self.out = (folder / "printed").open("w+")
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=self.out, stderr=subprocess.STDOUT, text=True)

    @property
    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def pids(self) -> list[int]:
        """By rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                ancestor = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                variables = dict(
                    entry.split("=", 1)
                    for entry in path.read_bytes().decode(errors="replace").split("\0")
                    if "=" in entry
                )
            except (OSError, ValueError):
                continue
            if ancestor == self.process.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(path.parent.name)
        return [found[number] for number in sorted(found)]

    def wait_for(self, condition: Callable[[], object]) -> None:
        while self.process.poll() is None and not condition():
            time.sleep(0.1)
        assert self.process.poll() is None, self.printed[-3000:]

    def seconds_until_ended(self, pid: int, most: float) -> float:
        started = time.monotonic()
        while time.monotonic() - started < most and state(pid) not in ("", "Z"):
            time.sleep(0.05)
        assert state(pid) in ("", "Z"), self.printed[-3000:]
        return time.monotonic() - started

    def end(self) -> str:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)
        return self.printed


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
