"""A small file cannot take the machine: its sizes are checked before anything is built of them."""

import contextlib
import errno
import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import ptmoe
from ptmoe.compare.plan import ComparePlan
from ptmoe.settings import read_yaml, yaml_text
from ptmoe.tasks.records import csv_rows, json_array, json_lines
from ptmoe.train import TrainOptions

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, "a: " + "[" * 190_000, "a: " + "9" * 5000, "a: !!timestamp x", "a: !!python/object:os.system x", "- 1"),
        *("\x00", "seed: 1\nseed: 2", "1: 2", "? [a]\n: b", "a: !!bool x", "a: " + "1:" * 9000 + "1.5"),
    ],
    ids="anchors nested digits timestamp object list control twice number-key list-key bool sixties".split(),
)
def test_yaml_that_is_no_configuration_is_refused_at_once(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ptmoe.PtmoeError):
        TrainOptions.read(path)


def test_yaml_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: " + "x" * 200_000)
    with pytest.raises(ptmoe.PtmoeError, match="needs at most 200,000"):
        read_yaml(path)


@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_a_file_that_the_system_does_not_let_be_read_is_said_so(tmp_path, monkeypatch, call):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, call, refused)
    with pytest.raises(ptmoe.PtmoeError, match=r"x\.yaml: Permission denied"):
        read_yaml(path)


def test_dates_are_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("day: 2026-11-26\nn: 3\ntime: 1:30\ncode: 010\n")
    assert read_yaml(path) == {"day": "2026-11-26", "n": 3, "time": "1:30", "code": "010"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(written=st.dictionaries(st.text(), JSON, max_size=3))
@example(written={"\x85": "a\x85b"})  # PyYAML itself reads it as spaces
def test_what_is_written_as_yaml_is_read_again(written):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(yaml_text({**written, "again": written}), encoding="utf-8", newline="")
        assert read_yaml(path) == {**written, "again": written}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", [TrainOptions, ComparePlan])
@given(data=st.data())
def test_any_yaml_gives_options_or_the_one_error(kind, data):
    names = st.sampled_from(sorted(kind.model_fields))
    written = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(yaml.safe_dump(written))
        with contextlib.suppress(ptmoe.PtmoeError):
            TrainOptions.read(path) if kind is TrainOptions else ComparePlan(**read_yaml(path))


def test_a_number_of_seeds_is_bounded():
    with pytest.raises(ptmoe.PtmoeError, match="at most 10,000"):
        ComparePlan(tasks=["nano/mixed"], seeds=1_000_000_000)


@pytest.mark.parametrize("read", [json_lines, json_array, csv_rows])
@pytest.mark.ci
def test_one_endless_line_in_a_small_gzip_is_one_bad_record_in_little_memory(tmp_path, read):
    """In a process of its own, whose memory is limited to 1.5 GB."""
    path = tmp_path / "x.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'[{"a": "' if read is json_array else b'{"a": "' if read is json_lines else b"a,b\n")
        for _ in range(200):
            file.write(b"x" * (1 << 20))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))\n"
        "from pathlib import Path; from ptmoe.tasks import records; from ptmoe.tasks.problems import Problems\n"
        "problems = Problems(skip=True)\n"
        f"print(len(list(records.{read.__name__}(Path(sys.argv[1]), problems))), problems.listed())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith("0 1 bad record(s)")
    assert "longer than 16 MB" in done.stdout
