"""`eval` and `compare` are killed: no answer and no cell is lost or done twice."""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch

from ptmoe.runs.folders import CELL_FILE, read_run
from ptmoe.runs.predictions import read_predictions
from testing.commands import started

EVAL = ["eval", "--model", "nano", "--task", "nano/mixed", "--examples", "24", "--batch-size", "2"]
QUICK = (1, 7)  # writes
SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in range(1, 21) if number not in QUICK]


def killed_at(folder, event):
    """The command in a forked process, killed at the n-th time that it makes, opens to write or renames a file."""
    if torch.cuda.is_available():
        pytest.skip("a forked process cannot use the GPU that this one has used")
    pid = os.fork()
    if pid == 0:
        seen = 0

        def watch(name, arguments):
            nonlocal seen
            opens = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if (opens or name in ("os.rename", "os.mkdir")) and str(arguments[0]).startswith(str(folder)):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            from ptmoe.cli import main

            sys.addaudithook(watch)
            sys.argv = ["ptmoe", *EVAL, "--output-dir", str(folder)]
            main()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "eval"
    assert killed_at(folder, 10**9) == 1
    return folder


@pytest.mark.parametrize("event", [*QUICK, *SLOW])
@pytest.mark.ci
def test_an_evaluation_that_is_killed_at_any_write_loses_no_answer(run, undisturbed, tmp_path, event):
    folder = tmp_path / "eval"
    if killed_at(folder, event) == 1:
        pytest.skip(f"the evaluation writes fewer than {event} times")
    path = folder / "predictions" / "nano__mixed.jsonl"
    before = path.read_bytes() if path.exists() else b""
    status, _, err = run(*EVAL, "--output-dir", folder)
    assert status == 0, err
    assert path.read_bytes().startswith(before)
    assert path.read_bytes() == (undisturbed / "predictions" / "nano__mixed.jsonl").read_bytes()
    ours, theirs = (json.loads((at / "eval" / "nano__mixed.json").read_text()) for at in (folder, undisturbed))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_a_comparison_with_two_jobs_that_is_killed_loses_no_cell(run, tmp_path, attempt):
    folder = tmp_path / "comparison"
    process, _ = started(folder, 2)
    time.sleep(random.Random(attempt).uniform(0, 4))
    process.kill()
    process.communicate(timeout=60)
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob(CELL_FILE)}
    status, _, err = run("compare", folder)
    assert status == 0, err
    cells = list(folder.rglob(CELL_FILE))
    assert len(cells) == 2
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items()), "a finished cell was run again"
    for cell in cells:
        (predictions,) = read_run(cell.parent).predictions.values()
        assert len(read_predictions(predictions)) == 8
