"""A comparison that is stopped or killed leaves no process behind, and the same command finishes it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptmoe.runs.folders import CELL_FILE


def started(folder, jobs):
    """The process and its children, once a cell is being trained."""
    command = [sys.executable, "-m", "ptmoe", "compare", "--model", "nano", "--task", "nano/mixed", "--method", "pt"]
    command += ["--seeds", "2", "--max-steps", "40", "--eval-examples", "8", "--jobs", jobs, "--output-dir", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.rglob("metrics.jsonl")):
        time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()
    return process, children(process.pid)


def children(parent):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(path.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_processes_end_with_it_and_the_same_command_finishes_it(tmp_path, jobs, number, run):
    folder = tmp_path / "comparison"
    process, workers = started(folder, jobs)
    assert len(workers) >= jobs - 1
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or b"continue with" in out
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    assert len(list(folder.rglob(CELL_FILE))) < 2
    status, _, err = run("compare", folder)
    assert status == 0, err
    assert len(list(folder.rglob(CELL_FILE))) == 2
