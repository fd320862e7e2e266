"""Tests need no network, no GPU and no more than one thread."""

import os

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
