"""The last layer at the supervised positions alone: the same losses and gradients, or not at all."""

import pytest
import torch
from transformers import PreTrainedModel

from ptmoe import METHODS, attach
from ptmoe.fast.last_layer import last_layer_obstacle
from ptmoe.models.causal import PromptedCausalLM
from testing.architectures import COMMON, HIDDEN, ROTARY
from testing.bases import CONFIGS, DEVICE, prompted, tiny, tiny_llama
from testing.losses import ROWS, assert_same, labelled, loss_and_gradients

NARROW = {"llama", "qwen2", "mistral", "gemma"}


def without_last_layer(model: PromptedCausalLM) -> None:
    model._fast._tried["last_layer"] = "not in this test"


@pytest.mark.parametrize("packing", [True, False])
def test_losses_and_gradients_are_those_of_the_whole_layer(base: PreTrainedModel, packing: bool) -> None:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).train()
    base.eval()
    inputs = labelled(ROWS, [3, 0, 1, 5, 2])
    assert (last_layer_obstacle(base) is None) == (base.config.model_type in NARROW)
    narrow = loss_and_gradients(model, inputs, packing)
    without_last_layer(model)
    assert_same(narrow, loss_and_gradients(model, inputs, packing))


@pytest.mark.parametrize("method", ["lora", "hydralora", "ft", "ia3"])
def test_methods_that_change_the_last_layer(method: str) -> None:
    model = attach(tiny_llama(), METHODS[method]()).train()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.add_(0.1 * drawn.to(DEVICE))
    inputs = labelled(ROWS, [0] * 5)
    narrow = loss_and_gradients(model, inputs, None)
    assert model.fast_paths()["last_layer"] is None
    without_last_layer(model)
    assert_same(narrow, loss_and_gradients(model, inputs, None))


def test_the_feed_forward_part_sees_supervised_positions_only() -> None:
    base = tiny_llama()
    model = prompted(base, CONFIGS["PT"]).train()
    seen: list[tuple[int, ...]] = []
    base.model.layers[-1].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    model(**labelled(ROWS, [0] * 5))
    assert seen[-1] == (1, 2 * len(ROWS), HIDDEN)
    out = model.eval()(**labelled(ROWS, [0] * 5))  # logits are wanted
    assert out.logits.shape[:2] == (5, 24)
    assert seen[-1][0] == 5


@pytest.mark.parametrize("by", ["config", "call"])
def test_a_mixture_asked_for_its_router_logits_computes_the_whole_layer(by: str) -> None:
    """It puts them together with the mask, position by position."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**COMMON, **ROTARY, num_local_experts=4)).to(DEVICE).eval()
    model = prompted(base, CONFIGS["PT"]).train()
    base.eval()
    inputs = labelled(ROWS, [0] * 5)
    expected = loss_and_gradients(model, inputs, False)
    asked = {} if by == "config" else {"output_router_logits": True}
    base.config.output_router_logits = by == "config"
    assert_same(loss_and_gradients(model, inputs | asked, False), expected)


def test_a_layer_put_together_in_another_way_is_found_out() -> None:
    """Granite scales what it adds, and its parts have the same names."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GraniteConfig(**sizes, num_key_value_heads=2, intermediate_size=64, residual_multiplier=0.3)
    base = GraniteForCausalLM(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    base.to(DEVICE)
    assert last_layer_obstacle(base) is not None
    inputs = labelled(ROWS, [0] * 5)
    model = prompted(base, CONFIGS["PT"]).train()
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


def test_it_is_left_alone_under_checkpointing_compilation_and_other_libraries() -> None:
    model = prompted(tiny_llama(), CONFIGS["PT"]).train()
    assert model.fast_paths()["last_layer"] is None
    model.gradient_checkpointing_enable()
    assert model.fast_paths()["last_layer"] is not None
    model.gradient_checkpointing_disable()
    assert model.fast_paths()["last_layer"] is None
    model.base_model.model.layers[-1].compile()
    assert model.fast_paths()["last_layer"] is not None
    base = tiny("llama")
    base.model.layers[-1].forward = base.model.layers[-1].forward  # as accelerate's hooks do
    assert last_layer_obstacle(base) is not None
