"""Tests need no network, no GPU and no more than one thread."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import hypothesis
import pytest

from testing.architectures import ARCHITECTURES  # torch is imported where tests run: with `-n`, not in the main process

gc.set_threshold(10_000, 10, 10)  # as in the command
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=5)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=500)  # --hypothesis-profile explore
hypothesis.settings.load_profile("tests")


QUICK = {"llama", "gemma2", "gpt2"}  # the architectures of the quick form, in tests that run over all of them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        chosen = getattr(item, "callspec", None)
        of = {chosen.params.get(name) for name in ("architecture", "base")} if chosen else set()
        if {name for name in of if isinstance(name, str)} & (ARCHITECTURES.keys() - QUICK):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "ci"]
        elif item.get_closest_marker("ci"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def numerics():
    import torch

    from testing.bases import DEVICE

    torch.set_num_threads(1)
    if DEVICE.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it has no heads as small as those of the tiny bases
        torch.backends.cudnn.allow_tf32 = False  # the tolerances are those of float32


@pytest.fixture(params=ARCHITECTURES)
def base(request):
    """A tiny random model of each architecture."""
    from testing.bases import tiny

    return tiny(request.param)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a `ptmoe` command in this process: exit status, standard output and standard error."""
    from ptmoe.cli import main

    monkeypatch.setenv("COLUMNS", "250")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptmoe", *map(str, arguments)])
        capsys.readouterr()  # what the test itself has printed, such as the bar of a base that it loads
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command
