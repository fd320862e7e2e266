"""Cells on Ray: the same files as in this process, each once, whatever dies; and a Ray that cannot be had."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptmoe.compare import on_ray, prepare, ray_session, read_plan
from ptmoe.compare.on_ray import RETRIES
from ptmoe.compare.ray_session import room, session
from ptmoe.compare.run import compare
from ptmoe.compare.watcher import Watcher
from ptmoe.errors import PtmoeError
from ptmoe.runs.searches import RateSearch
from ptmoe.train.options import TrainOptions
from testing import ray_cells
from testing.commands import alive, children, descendants, started
from testing.ray_cells import ALWAYS, ATTEMPTS, BROKEN, ONCE, TALKING

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ptmoe[ray]'"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]
TINY = {"max_steps": 2, "eval_examples": 5, "per_device_train_batch_size": 2, "max_examples": 8}
PLAN = {**TINY, "methods": ["pt", "dpt"], "budget": 900, "tasks": ["nano/mixed"], "seeds": 2}
TIMED = {"train_seconds", "seconds", "examples_per_second"}


@pytest.fixture(scope="module", autouse=True)
def connected(tmp_path_factory):
    """Ray, which the tests' comparisons find connected; and the file of `ray_cells`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 4)
        patch.setenv(ATTEMPTS, str(tmp_path_factory.mktemp("ray") / "attempts.txt"))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the workers need `testing` too
        with session("ray", 4, None, 0) as room:
            yield room.ray


@pytest.fixture
def attempts(monkeypatch):
    monkeypatch.setattr(on_ray, "CellActor", ray_cells.Quick)
    path = Path(os.environ[ATTEMPTS])
    path.write_text("")
    return lambda: Counter(map(int, path.read_text().split()))


def prepared(folder, **changes):
    asked = {**PLAN, "output_dir": str(folder), "on": "ray", "jobs": 2, **changes}
    return prepare(read_plan(None, asked), say=lambda line: None)


class Recorder(Watcher):
    def __init__(self):
        self.told, self.outcomes = [], []

    def step(self, cell, done, steps, loss):
        self.told.append((cell.seed, done, steps))

    def message(self, cell, text):
        self.told.append((cell.seed, text))

    def ended(self, cell, outcome):
        self.outcomes.append((cell.seed, outcome))


def files(folder):
    """The content of each file; of one that tells the time, its name alone."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    timed = ("environment.json", "result.json", "metrics.jsonl")
    return {
        name: b"" if name.endswith(timed) or "/eval/" in name else content
        for name, content in found.items()
        if name not in ("log.txt", "comparison.yaml")
    }


@pytest.mark.slow
def test_the_files_are_those_of_cells_in_this_process(tmp_path):
    assert compare(prepared(tmp_path / "ray", seeds=1, jobs=1)) == []
    assert compare(prepared(tmp_path / "here", seeds=1, on="processes", jobs=1)) == []
    one, other = files(tmp_path / "ray"), files(tmp_path / "here")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert "cells/pt/nano__mixed/seed-0/adapter/adapter_model.safetensors" in one
    written = [(tmp_path / name / "comparison.yaml").read_text() for name in ("ray", "here")]
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_search_for_learning_rates_chooses_what_it_chooses_in_this_process(tmp_path):
    asked = {"search": True, "search_factors": [0.1, 1], "search_seeds": 1, "search_examples": 20, "seeds": 1}
    for name, changes in (("ray", {}), ("here", {"on": "processes", "jobs": 1}), ("two", {"on": "processes"})):
        assert compare(prepared(tmp_path / name, **asked, **changes)) == []
    found = {name: RateSearch.read_lines(tmp_path / name / "search.jsonl") for name in ("ray", "here", "two")}
    for name, searches in found.items():
        assert {search.label: search.chosen for search in searches} == {s.label: s.chosen for s in found["here"]}
        assert {search.label: search.scores for search in searches} == {s.label: s.scores for s in found["here"]}
        assert not (tmp_path / name / "search").exists()
        for search in searches:
            config = tmp_path / name / "cells" / search.label / "nano__mixed" / "seed-0" / "config.yaml"
            assert TrainOptions.read(config).learning_rate == search.chosen
            assert TrainOptions.read(config).validation_examples is None


@pytest.mark.ci
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_forty_cells_end_once_each_though_a_worker_is_killed(tmp_path, attempts, workers):
    comparison, watcher = prepared(tmp_path / "c", seeds=20, jobs=workers), Recorder()
    assert compare(comparison, watcher) == []
    assert len(comparison.cells) == 40
    assert Counter(watcher.outcomes) == {(seed, 7): 2 for seed in range(20)}
    assert attempts() == {seed: 3 if seed == ONCE else 2 for seed in range(20)}, "the killed one's cell alone again"
    for cell in comparison.cells:
        place = comparison.folder.run_folder(cell)
        assert sorted(path.name for path in place.rglob("*") if path.is_file()) == ["cell.json", "result.txt"]
        assert (place / "eval" / "result.txt").read_text() == f"{cell.variant.config.method} {cell.seed}"
    assert comparison.unfinished == []
    compare(prepared(tmp_path / "c", seeds=20))
    assert sum(attempts().values()) == 41, "finished cells are not run again"


@pytest.mark.slow
def test_a_cell_that_always_kills_its_process_fails_and_the_others_end(tmp_path, attempts):
    watcher = Recorder()
    failed = compare(prepared(tmp_path / "c", methods=["pt"], seeds=[1, ALWAYS, BROKEN, TALKING]), watcher)
    assert sorted(failure.seed for failure in failed) == [ALWAYS, BROKEN]
    errors = {failure.seed: failure.error for failure in failed}
    place = tmp_path / "c" / "cells" / "pt" / "nano__mixed"
    assert f"its process or its machine died {RETRIES + 1} times" in errors[ALWAYS]
    assert attempts() == {1: 1, ALWAYS: RETRIES + 1, BROKEN: 1, TALKING: 1}
    assert errors[BROKEN] == f"RuntimeError: out of memory, see {place / f'seed-{BROKEN}'}"
    assert "in run_cell" in (tmp_path / "c" / "log.txt").read_text(), "the traceback of an unforeseen error"
    assert (TALKING, f"written to {place / f'seed-{TALKING}'}") in watcher.told
    assert (place / f"seed-{BROKEN}" / "half.txt").exists()
    assert not (place / f"seed-{ALWAYS}").exists()


@pytest.mark.ci
def test_a_machine_with_another_version_stops_the_comparison_before_a_cell(tmp_path, attempts, monkeypatch):
    monkeypatch.setattr(on_ray, "__version__", "9.9.9")
    with pytest.raises(PtmoeError, match=r"ptmoe is .* on .* and 9\.9\.9 here: install one version on both"):
        compare(prepared(tmp_path / "c", jobs=1))
    assert not attempts()


@pytest.mark.ci
def test_a_session_within_another_leaves_the_environment_as_it_was(connected, monkeypatch):
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    before = dict(os.environ)
    with session("ray://auto", 1, 1, 0):
        pass
    assert dict(os.environ) == before


@pytest.mark.ci
def test_ray_of_its_own_takes_no_connection_from_another_machine(connected):
    assert connected.get_runtime_context().gcs_address.startswith("127.0.0.1:")


# -- a Ray that cannot be had ------------------------------------------------------------------------------------------


def test_ray_that_is_asked_for_and_missing_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_session.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path / "c"
    status, _, err = run("compare", "--task", "nano/mixed", "--on", "ray", "--output-dir", folder)
    assert status == 2
    assert "--on ray needs Ray, which is not installed: pip install 'ptmoe[ray]'" in err
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_an_address_that_does_not_answer_is_refused_within_a_bounded_time(tmp_path, answers):
    """A port on which nobody listens, and one on which somebody does who is not Ray."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{listening.getsockname()[1]}"
        if answers:
            listening.listen()
            threading.Thread(target=_silent, args=(listening,), daemon=True).start()
        command = "compare", "--task", "nano/mixed", "--on", address, "--output-dir", str(tmp_path / "c")
        made = outside("ptmoe", *command, timeout=240)
    assert made.returncode == 2
    assert f"no Ray cluster answers at {address}: give the address of its client" in made.stderr
    assert "Traceback" not in made.stderr
    assert not (tmp_path / "c").exists()


def outside(module, *arguments, timeout):
    """A module in a process of its own, that knows nothing of this one's Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TMPDIR"))}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def _silent(listening):
    kept = []
    while True:
        try:
            kept.append(listening.accept())
        except OSError:
            return


@pytest.mark.parametrize("on", ["ray://", "ray://host", "ray://host:x", "ray:auto", "host:6379", "ray://a:1/x", "Ray"])
@pytest.mark.ci
def test_what_is_no_address_is_refused(on):
    with pytest.raises(PtmoeError, match="needs processes, ray, ray://auto"):
        ray_session.check_place(on)


def nodes(*resources):
    listed = [{"Alive": True, "Resources": each} for each in resources]
    return SimpleNamespace(nodes=lambda: [*listed, {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}])


BOX, EIGHT = {"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("machines", "on", "jobs", "gpus", "expected"),
    [
        ([BOX], "ray", None, None, (2, 0)),
        ([BOX], "ray", 3, None, (3, 0)),
        ([BOX], "ray", 9, None, (4, 0)),
        ([BOX, BOX], "ray://auto", None, None, (8, 0)),
        ([EIGHT, BOX], "ray://auto", None, None, (8, 1)),
        ([EIGHT, BOX], "ray://auto", 16, None, (16, 0.5)),
        ([EIGHT, BOX], "ray://auto", None, 0.25, (32, 0.25)),
        ([EIGHT, EIGHT], "ray://auto", None, 0.3, (48, 0.3)),
        ([EIGHT, EIGHT], "ray://auto", None, 3, (4, 3)),
        ([EIGHT, BOX], "ray://auto", None, 0, (68, 0)),
        ([{"CPU": 8.0, "GPU": 1.0}], "ray", None, None, (1, 1)),
    ],
)
@pytest.mark.ci
def test_there_are_as_many_cells_at_once_as_there_is_room_for(machines, on, jobs, gpus, expected):
    found = room(nodes(*machines), on, 2, jobs, gpus)
    assert (found.jobs, found.gpus) == expected


@pytest.mark.ci
def test_a_cell_that_no_machine_has_room_for_is_refused():
    with pytest.raises(PtmoeError, match=r"a cell needs 1 GPUs, and no machine of ray://auto has more than 0: lower"):
        room(nodes(BOX), "ray://auto", 2, None, 1)
    with pytest.raises(PtmoeError, match=r"no machine of ray://auto has a CPU for a cell"):
        room(nodes({"CPU": 0.0}), "ray://auto", 2, None, None)


# -- real cells, and signals -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_forty_real_cells_with_a_killed_worker_give_the_files_of_this_process(tmp_path, capfd):
    watcher, killed = Recorder(), []

    def ended(cell, outcome):
        watcher.outcomes.append((cell.seed, outcome))
        if len(watcher.outcomes) == 10:
            workers = [pid for raylet in children(os.getpid()) for pid in children(raylet)]
            killed.append(next(pid for pid in workers if b"CellActor" in Path(f"/proc/{pid}/cmdline").read_bytes()))
            os.kill(killed[0], signal.SIGKILL)

    watcher_of = type("Killer", (Recorder,), {"ended": lambda self, *what: ended(*what)})()
    assert compare(prepared(tmp_path / "ray", seeds=20, jobs=4), watcher_of) == []
    assert killed
    assert len(watcher.outcomes) == 40
    assert len(set((tmp_path / "ray").rglob("cell.json"))) == 40
    assert compare(prepared(tmp_path / "here", seeds=20, on="processes", jobs=1)) == []
    one, other = files(tmp_path / "ray"), files(tmp_path / "here")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    printed = capfd.readouterr()
    assert "raylet" not in printed.out + printed.err


@pytest.mark.slow
def test_a_machine_of_a_cluster_that_goes_takes_no_cell_with_it(tmp_path):
    made = outside("testing.ray_nodes", str(tmp_path), timeout=300)
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout.splitlines()[-1])
    assert found["failed"] == []
    assert sorted(found["ended"]) == [[seed, 7] for seed in range(40)]
    assert len(list((tmp_path / "c").rglob("cell.json"))) == 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_processes_end_with_it_and_the_same_command_finishes_it(tmp_path, number, run):
    folder = tmp_path / "comparison"
    process, _ = started(folder, 1, "--on", "ray", sign="cell.json")
    own = descendants(process.pid)
    assert len(own) > 3
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("cell.json")}
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
    assert number == signal.SIGKILL or b"continue with" in out
    deadline = time.monotonic() + 90  # what Ray keeps for a machine looks for Ray itself for a while
    while any(map(alive, own)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(filter(alive, own))
    assert len(finished) == 1
    status, _, err = run("compare", folder)
    assert status == 0, err
    assert len(list(folder.rglob("cell.json"))) == 2
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
