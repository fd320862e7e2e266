"""cuDNN's attention is left out on a CUDA device, and only while a base runs; a CPU computes short rows by products."""

from types import SimpleNamespace

import pytest
import torch

from ptmoe.fast import attention, packing
from ptmoe.fast.attention import SHORT, by_products, causal_products, kernel, products_obstacle, without_plans
from ptmoe.models import causal
from testing.bases import CONFIGS, DEVICE, prompted, tiny, tiny_llama, tokens
from testing.losses import assert_same, labelled, loss_and_gradients

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


SHAPES = [(1, 1, 1, 1, 4, 4), (2, 4, 4, 7, 8, 8), (3, 6, 2, 33, 8, 8), (2, 8, 1, 20, 16, 6), (1, 9, 3, 120, 64, 64)]


def attended(attention, dtype, tensors, gradient):
    given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    out = attention(*given)
    return [out, *torch.autograd.grad(out, given, gradient.to(dtype))]


@pytest.mark.parametrize(("rows", "heads", "shared", "tokens", "size", "of_value"), SHAPES)
def test_products_are_causal_attention_as_exact_as_torchs_kernel(rows, heads, shared, tokens, size, of_value):
    def drawn(heads, size):
        return torch.randn(rows, tokens, heads, size, generator=generator, dtype=torch.float64).transpose(1, 2)

    generator = torch.Generator().manual_seed(0)
    tensors = drawn(heads, size), drawn(shared, size), drawn(shared, of_value)
    tensors = [tensor.bfloat16().double() for tensor in tensors]
    gradient = drawn(heads, of_value).bfloat16().double()
    exact = attended(kernel, torch.float64, tensors, gradient)
    torch.testing.assert_close(attended(causal_products, torch.float64, tensors, gradient), exact)
    ours = attended(causal_products, torch.bfloat16, tensors, gradient)
    theirs = attended(kernel, torch.bfloat16, tensors, gradient)
    for made, other, right in zip(ours, theirs, exact, strict=True):
        assert (made - right).norm() <= 2 * (other - right).norm() + 1e-3 * right.norm()


def test_products_scale_as_they_are_told():
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.7)
    torch.testing.assert_close(causal_products(query, key, value, 0.7), expected)


@pytest.mark.parametrize(
    ("tokens", "options", "causal", "taken"),
    [
        (SHORT, {"scaling": 0.1, "dropout": 0.0, "position_ids": torch.zeros(1), "use_cache": False}, True, True),
        (SHORT, {"sliding_window": None, "softcap": None}, True, True),
        (SHORT + 1, {}, True, False),
        (9, {"dropout": 0.1}, True, False),
        (9, {"softcap": 30.0}, True, False),
        (9, {"something_new": 1}, True, False),
        (9, {}, False, False),
        (9, {"is_causal": True}, False, True),
        (9, {"is_causal": False}, True, False),
    ],
)
def test_products_only_where_they_are_what_the_layer_asks_for(tokens, options, causal, taken):
    assert by_products(SimpleNamespace(is_causal=causal), torch.zeros(1, 1, tokens, 4), options) == taken


def test_products_only_of_batches_whose_probabilities_are_few():
    assert by_products(SimpleNamespace(), torch.empty(8, 32, 256, 1), {})
    assert not by_products(SimpleNamespace(), torch.empty(32, 9, 512, 1), {})


def test_products_for_which_bases(monkeypatch):
    monkeypatch.setattr(attention, "_products_are_faster", lambda: True)
    if DEVICE.type != "cpu":
        assert "CPU" in products_obstacle(tiny_llama().bfloat16())
        return
    assert products_obstacle(tiny_llama().bfloat16()) is None
    assert "bfloat16" in products_obstacle(tiny_llama())
    assert "not torch's" in products_obstacle(tiny("llama", attn_implementation="eager").bfloat16())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="no other device computes by products")
@pytest.mark.parametrize("lengths", [(9, 24, 5, 17, 24), (20, 20)], ids=["padded", "equally long"])
def test_by_products_losses_and_gradients_are_those_of_the_kernel(base, lengths, monkeypatch):
    """On every architecture, in float32, where the two can be told from errors."""
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).train()
    base.eval()
    inputs = labelled([tokens(length, seed=length) for length in lengths], [0] * len(lengths))
    expected = loss_and_gradients(model, inputs, None)
    model.fast_paths()  # whose trials attend as well
    made = []
    monkeypatch.setattr(packing, "products_obstacle", lambda _: None)
    monkeypatch.setattr(causal, "products_obstacle", lambda _: None)
    monkeypatch.setattr(packing, "causal_products", lambda *given: made.append(given) or causal_products(*given))
    assert_same(loss_and_gradients(model, inputs, None), expected)
    assert bool(made) == (base.config.model_type not in {"mistral", "gemma2"})  # a window, a soft cap
