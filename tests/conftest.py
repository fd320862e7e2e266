"""Tests need no network, no GPU and no more than one thread."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from bases import ARCHITECTURES, tiny
from transformers import PreTrainedModel

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=5)
hypothesis.settings.load_profile("tests")


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each architecture."""
    return tiny(request.param)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a `ptmoe` command in this process: exit status, standard output and standard error."""
    from ptmoe.cli import main

    monkeypatch.setenv("COLUMNS", "250")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptmoe", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command
