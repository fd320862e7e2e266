"""cuDNN's attention is left out on a CUDA device, and only while a base runs."""

from types import SimpleNamespace

import pytest
import torch

from ptmoe.fast.attention import without_plans
from testing.bases import DEVICE, tiny_llama

enabled = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture(autouse=True)
def _switched_on():
    before = enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def base(device="cuda", recomputes=False):
    return SimpleNamespace(device=torch.device(device), is_activation_checkpointing=recomputes)


def test_it_is_left_out_within_and_back_afterwards_whatever_happens():
    with without_plans(base()):
        assert not enabled()
        with without_plans(base()):
            assert not enabled()
        assert not enabled()
    assert enabled()
    with pytest.raises(ZeroDivisionError), without_plans(base()):
        raise ZeroDivisionError
    assert enabled()


def test_what_the_user_has_switched_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    with without_plans(base()):
        assert not enabled()
    assert not enabled()


@pytest.mark.parametrize("other", [base("cpu"), base(recomputes=True)], ids=["on a CPU", "recomputed layers"])
def test_elsewhere_nothing_is_switched(other):
    with without_plans(other):
        assert enabled()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_base_runs_without_it_in_training_and_generation(monkeypatch):
    import ptmoe

    seen = []
    model = ptmoe.attach(tiny_llama(), ptmoe.PTConfig(num_virtual_tokens=3))
    model.base_model.register_forward_pre_hook(lambda *_: seen.append(enabled()))
    ids = torch.arange(3, 9, device=DEVICE)[None]
    model.train()(ids, labels=ids).loss.backward()
    model.eval()(ids)
    model.generate(ids, max_new_tokens=2)
    assert seen
    assert not any(seen)
