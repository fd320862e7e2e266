"""Compiled layers: the same losses and gradients, or none."""

import warnings

import pytest
import torch
from transformers import PreTrainedModel

from ptmoe.fast.compiled import compile_layers
from testing.bases import CONFIGS, prompted, tiny_llama
from testing.losses import ROWS, assert_same, labelled, loss_and_gradients

INPUTS = labelled(ROWS, [0] * 5)


@pytest.fixture
def model() -> object:
    torch.compiler.reset()
    yield prompted(tiny_llama(), CONFIGS["PT"]).train()
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_losses_and_gradients_are_those_of_the_plain_layers(model, packing: bool) -> None:
    plain = loss_and_gradients(model, INPUTS, packing)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compile_layers(model.base_model, backend="aot_eager") is None
    layer = model.base_model.model.layers[0]
    assert layer._compiled_call_impl is not None
    assert_same(loss_and_gradients(model, INPUTS, packing), plain)


@pytest.mark.slow
def test_a_compiler_that_fails_is_gone_on_without_and_named_once(model) -> None:
    plain = loss_and_gradients(model, INPUTS, None)

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler here")

    torch._dynamo.register_backend(broken, name="broken_for_a_test")
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM is not compiled \(.*no C\+\+ compiler here") as said:
        assert "no C++ compiler" in compile_layers(model.base_model, backend="broken_for_a_test")
    assert len(said) == 1
    assert_same(loss_and_gradients(model, INPUTS, None), plain)


def test_a_base_without_such_layers_is_left_alone() -> None:
    base: PreTrainedModel = tiny_llama()
    base.model.layers = torch.nn.ModuleList()
    with pytest.warns(UserWarning, match="no repeated layers"):
        assert compile_layers(base) is not None
