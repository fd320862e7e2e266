"""A disk that fills, that turns read-only or that refuses a name ends every command in one sentence; what was there
stays, nothing is left half-written, and the same command ends the work later."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ptmoe.errors import PtmoeError
from ptmoe.files import append, check_name, replaced
from ptmoe.runs.folders import evaluation_file, file_name, predictions_file
from testing.commands import run_command

SMALL = ["--max-steps", "4", "--eval-examples", "8", "--batch-size", "4", "--num-virtual-tokens", "4"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A finished run of pt, data, and answers to it."""
    folder = tmp_path_factory.mktemp("sources")
    command = ["train", "--method", "pt", "--task", "nano/mixed", "--max-examples", "40", *SMALL]
    run_command(*command, "--output-dir", folder / "run")
    lines = [{"id": f"{number}", "prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = [{"id": line["id"], "text": line["completion"]} for line in lines]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return folder


def commands(sources, target):
    """Each command that writes, and its place to write to."""
    run, data = sources / "run", sources / "data.jsonl"
    train = ["--task", "nano/mixed", "--max-examples", 40, "--save-steps", 2, "--method", "pt", *SMALL]
    compare = ["--model", "nano", "--task", "nano/mixed", "--method", "pt:num_virtual_tokens=4", *SMALL[:6]]
    return {
        "train": ["train", *train, "--output-dir", target],
        "eval": ["eval", run, "--task", "nano/mixed", "--examples", 8, "--output-dir", target],
        "compare": ["compare", *compare, "--jobs", 1, "--output-dir", target],
        "quickstart": ["quickstart", "--steps", 2, "--output-dir", target],
        "inspect": ["inspect", run, "--task", "nano/mixed", "--examples", 8, "--output-dir", target],
        "score": ["score", data, sources / "answers.jsonl", "--output", target],
        "convert": ["convert", run / "adapter", target],
    }


PRINTING = [
    ["--version"],
    ["tasks"],
    *(pytest.param(one.split(), marks=pytest.mark.slow) for one in ("--help", "params")),
]
WRITING = ["train", "eval", "compare", "inspect", "score", "convert"]
ALL = [*WRITING, pytest.param("quickstart", marks=pytest.mark.slow)]


# -- faults ------------------------------------------------------------------------------------------------------------


class Disk:
    """From the n-th time on that something is made, opened to write or renamed in a folder, the system refuses it."""

    def __init__(self):
        self.place, self.left, self.number = None, 0, errno.ENOSPC
        sys.addaudithook(self._watch)  # it cannot be removed

    def _watch(self, event, arguments):
        if self.place is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            if not (set(mode) & set("wax+") if isinstance(mode, str) else (flags or 0) & (os.O_WRONLY | os.O_RDWR)):
                return
        if isinstance(arguments[0], str | os.PathLike) and str(arguments[0]).startswith(self.place):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number), str(arguments[0]))

    @contextlib.contextmanager
    def refusing(self, place, after, number):
        self.place, self.left, self.number = str(place), after, number
        try:
            yield
        finally:
            self.place = None


DISK = Disk()


@contextlib.contextmanager
def no_file_over(size):
    """Every `write`, of Python and of libraries, ends at so many bytes of a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}


def check_whole(folder):
    """Whatever has its final name is whole."""
    for path, content in files(folder).items():
        assert path.suffix != ".part", path
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".jsonl":
            assert [json.loads(line) for line in content.splitlines()] or not content
            assert content[-1:] in (b"\n", b"")
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                list(opened.keys())
        elif path.suffix == ".png":
            assert content.endswith(b"IEND\xaeB`\x82"), path
        elif path.suffix in (".html", ".svg"):
            assert content.rstrip().endswith((b"</html>", b"</svg>")), path


def check_refused(status, out, err, place):
    assert status in (1, 2), out + err
    assert "Traceback" not in out + err
    said = [line for line in (err + out).splitlines() if line.startswith(("error: ", "failed: "))]
    assert said, out + err
    assert all(str(place) in line for line in said), said


def check_recovers(run, command, arguments, target):
    if command == "convert":  # which wants an empty folder
        shutil.rmtree(target, ignore_errors=True)
    again = [*arguments, "--resume"] if command == "train" and target.exists() else arguments
    status, out, err = run(*again)
    assert status == 0, out + err
    check_whole(target)


FAULTS = [
    pytest.param(0, errno.ENOSPC, marks=pytest.mark.slow, id="full-0"),
    pytest.param(2, errno.ENOSPC, id="full-2"),
    *[pytest.param(number, errno.EROFS, marks=pytest.mark.slow, id=f"read-only-{number}") for number in (0, 1, 3)],
    *[pytest.param(number, errno.EIO, marks=pytest.mark.slow, id=f"damaged-{number}") for number in (4, 8, 14)],
    pytest.param(0, errno.EACCES, marks=pytest.mark.slow, id="forbidden"),
    pytest.param(5, errno.EDQUOT, marks=pytest.mark.slow, id="quota"),
]


@pytest.mark.ci
@pytest.mark.parametrize("command", ALL)
@pytest.mark.parametrize(("after", "number"), FAULTS)
def test_a_disk_that_refuses_a_file_ends_a_command_in_words(run, sources, tmp_path, command, after, number):
    target = tmp_path / "target"
    arguments, before = commands(sources, target)[command], files(sources)
    with DISK.refusing(tmp_path, after, number):
        status, out, err = run(*arguments)
    if status == 0:
        pytest.skip(f"the command makes no {after + 1} files")
    check_refused(status, out, err, target)
    assert os.strerror(number) in out + err
    check_whole(target)
    assert files(sources) == before
    check_recovers(run, command, arguments, target)


@pytest.mark.ci
@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("size", [100, *(pytest.param(size, marks=pytest.mark.slow) for size in (0, 4000, 20000))])
def test_a_disk_that_fills_within_a_file_ends_a_command_in_words(run, sources, tmp_path, command, size):
    target = tmp_path / "target"
    arguments, before = commands(sources, target)[command], files(sources)
    with no_file_over(size):
        status, out, err = run(*arguments)
    if status == 0:
        pytest.skip(f"the command makes no file of more than {size} bytes")
    check_refused(status, out, err, target)
    check_whole(target)
    assert files(sources) == before
    check_recovers(run, command, arguments, target)


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_real_disk_without_room_ends_a_command_in_words(run, sources, tmp_path, command, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    room = {"eval": 1, "inspect": 0, "score": 0, "convert": 0}.get(command, 5)  # pages of 4 kB
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={4096 * (room + 1)}", "none", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            (disk / "filler").write_bytes(bytes(4096))
        target = disk / "target"
        arguments = commands(sources, target)[command]
        status, out, err = run(*arguments)
        check_refused(status, out, err, disk)
        check_whole(target)
        subprocess.run(["mount", "-o", "remount,rw,size=64m", disk], check=True)
        check_recovers(run, command, arguments, target)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_an_evaluation_that_is_done_anew_leaves_the_earlier_result_where_the_disk_is_full(run, sources, tmp_path):
    target = tmp_path / "target"
    arguments = commands(sources, target)["eval"]
    assert run(*arguments)[0] == 0
    before = (target / "eval" / "nano__mixed.json").read_bytes()
    with no_file_over(100):
        status, out, err = run(*arguments, "--overwrite")
    check_refused(status, out, err, target)
    assert (target / "eval" / "nano__mixed.json").read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no /dev/full")
@pytest.mark.parametrize("arguments", PRINTING)
def test_a_full_disk_behind_standard_output_is_said_once(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ptmoe", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "No space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval", "compare", "quickstart", "inspect", "score", "convert"])
@pytest.mark.parametrize("name", ["x" * 300, "ä" * 150, "a\nb", "a\x1b[31mb"], ids=["long", "wide", "line", "escape"])
def test_a_name_that_no_folder_can_have_is_refused_before_any_work(run, sources, tmp_path, monkeypatch, command, name):
    def work(*_, **__):
        raise AssertionError("a base is loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", work)
    status, _, err = run(*commands(sources, tmp_path / name)[command])
    assert (status, "Traceback" in err) == (2, False), err
    assert "at most 255" in err or "control character" in err
    assert "\x1b" not in err
    assert not list(tmp_path.iterdir())


def test_a_name_from_a_file_is_checked_as_well(run, tmp_path):
    (tmp_path / "x.yaml").write_text('task: nano/mixed\noutput_dir: "a\\0b"\n')
    status, _, err = run("train", tmp_path / "x.yaml")
    assert (status, "control character" in err) == (2, True), err


@given(st.text(min_size=1, max_size=400), st.text(min_size=1, max_size=400))
def test_every_text_has_a_file_name_of_its_own(first, other):
    for name in (first, other):
        check_name(evaluation_file(Path("run"), name))
        check_name(predictions_file(Path("run"), name).with_suffix(".settings.json"))
        assert len(os.fsencode(file_name(name))) <= 220
    if first.replace("/", "__") != other.replace("/", "__"):
        assert file_name(first) != file_name(other)


@pytest.mark.ci
def test_a_label_of_300_characters_is_compared(run, tmp_path):
    label = "a long name " * 25
    method = f"pt:num_virtual_tokens=4,label={label.strip()}"
    target = ["--jobs", 1, "--output-dir", tmp_path / "target"]
    status, out, err = run(
        "compare", "--model", "nano", "--task", "nano/mixed", "--method", method, *SMALL[:6], *target
    )
    assert status == 0, out + err
    check_whole(tmp_path / "target")


def test_data_with_the_longest_possible_name_is_evaluated(run, sources, tmp_path):
    data = tmp_path / f"{'x' * 249}.jsonl"
    shutil.copy(sources / "data.jsonl", data)
    status, out, err = run("eval", "--model", "nano", "--task", data, "--output-dir", tmp_path / "target")
    assert status == 0, out + err


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_library_s_own_error_of_the_disk_becomes_the_system_s(tmp_path):
    with pytest.raises(OSError, match="No space left on device") as raised, replaced(tmp_path / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="other"), replaced(tmp_path / "x"):
        raise RuntimeError("other")
    assert not list(tmp_path.iterdir())


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 130))
def test_lines_are_appended_whole_or_not_at_all(tmp_path_factory, first, more, size):
    path = tmp_path_factory.mktemp("append") / "x.jsonl"
    path.write_bytes(first)
    with no_file_over(size), contextlib.suppress(OSError):
        append(path, more)
    assert path.read_bytes() == (first + more if len(first + more) <= size or not more else first)


def test_a_name_is_checked_in_all_its_parts(tmp_path):
    check_name(tmp_path / ("x" * 255) / "y")
    with pytest.raises(PtmoeError, match="256 bytes"):
        check_name(tmp_path / ("x" * 256) / "y")
