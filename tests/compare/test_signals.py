"""A comparison that is stopped or killed leaves no process behind, and the same command finishes it."""

import signal
import time
from pathlib import Path

import pytest

from ptmoe.runs.folders import CELL_FILE
from testing.commands import alive, started


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
