"""Commands for fixtures, in this process; and a comparison in processes of its own, to stop and to kill."""

import contextlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

from ptmoe.cli import main


def run_command(*arguments):
    """A `ptmoe` command in this process, which has to succeed."""
    out, err = io.StringIO(), io.StringIO()
    argv = patch.object(sys, "argv", ["ptmoe", *map(str, arguments)])
    status = None
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            status = stop.code
    assert not status, out.getvalue() + err.getvalue()


def started(folder, jobs, *options, command="compare", sign="metrics.jsonl"):
    """The process and its children, once a cell is being trained, or a file of another name is there."""
    own = ["--seeds", "2", "--eval-examples", "8"] if command == "compare" else []
    command = [sys.executable, "-m", "ptmoe", command, "--model", "nano", "--task", "nano/mixed", "--method", "pt"]
    command += [*own, "--max-steps", "40", "--jobs", jobs, "--output-dir", folder, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(folder.rglob(sign)):
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


def descendants(parent):
    return [pid for child in children(parent) for pid in (child, *descendants(child))]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
