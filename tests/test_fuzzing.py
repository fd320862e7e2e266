"""Whatever a file holds, `PtmoeError` comes out of reading it, or nothing; in 5 s, and within 1 GB.

The long form's numbers are those of docs/reliability.md; `PTMOE_FUZZ` multiplies them.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from testing.fuzzing import TARGETS, changed

QUICK = {"adapters": 60, "train": 60, "plans": 30, "predictions": 60}
LONG = {"adapters": 20_000, "train": 5_000, "plans": 5_000, "predictions": 2_000}


def fuzz(name, examples, *, random):
    target = TARGETS[name]()

    @settings(
        max_examples=examples,
        derandomize=not random,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def survives(data):
        place = data.draw(st.sampled_from(sorted(target.originals)))
        target.survives(place, data.draw(changed(place, target.originals[place])))

    survives()


@pytest.fixture(autouse=True)
def stays_in_its_folder():
    before = os.getcwd()
    yield
    os.chdir(before)


@pytest.mark.ci
@pytest.mark.parametrize("name", TARGETS)
def test_as_they_are_the_files_are_read(name):
    target = TARGETS[name]()
    for place, content in target.originals.items():
        if name == "train":
            with pytest.raises(Exception, match="all is checked"):
                target.read(place, content)
        else:
            target.read(place, content)


SIZES = "rank r num_virtual_tokens num_experts num_sources bottleneck encoder_hidden_size hidden_size".split()


@pytest.mark.parametrize("size", [300_000, 10**18])
@pytest.mark.ci
def test_a_size_that_the_tensors_do_not_have_is_refused_before_it_is_built(size):
    target, tried = TARGETS["adapters"](), set()
    for place, content in target.originals.items():
        config = json.loads(content) if place.endswith(".json") else {}
        for name in [name for name in SIZES if isinstance(config.get(name), int)]:
            assert not target.survives(place, json.dumps(config | {name: size}).encode())
            tried.add(name)
    assert tried == set(SIZES)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.ci
def test_a_changed_file_is_read_or_refused(name):
    fuzz(name, QUICK[name], random=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_changed_files_are_read_or_refused(name):
    fuzz(name, round(LONG[name] * float(os.environ.get("PTMOE_FUZZ", "1"))), random=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_what_atheris_makes_of_the_files_is_read_or_refused(name):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    runs = round(LONG[name] * float(os.environ.get("PTMOE_FUZZ", "1")))
    options = [f"-runs={runs}", "-max_len=100000", "-rss_limit_mb=4096", f"-artifact_prefix={os.devnull}"]
    command = [sys.executable, "-m", "testing.fuzzing", name, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
