"""Linear layers by oneDNN: the same losses, gradients and tokens, or not at all."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ptmoe import METHODS, attach
from ptmoe.fast import linear
from ptmoe.fast.linear import use_onednn
from ptmoe.models.decoding import Decoder
from testing.bases import CONFIGS, DEVICE, prompted, tiny, tiny_llama
from testing.decoding import decoded, generated
from testing.losses import ROWS, assert_same, labelled, loss_and_gradients

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="oneDNN computes on the CPU alone"),
]


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine's verdict is."""
    monkeypatch.setattr(linear, "_faster_here", lambda: True)


def replaced(base: PreTrainedModel) -> list[str]:
    with use_onednn(base):
        return [name for name, module in base.named_modules() if "forward" in vars(module)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of what goes into each product by oneDNN."""
    seen: list[tuple[int, ...]] = []
    product = linear._product

    def noted(input: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        seen.append(tuple(input.shape))
        return product(input, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "_product", noted)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 4, 7), (0, 7), (2, 0, 7)])
def test_a_layer_and_its_gradient(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(7, 5, bias=bias).requires_grad_(False)
    one, other = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    made, expected = linear.OneDNNForward(layer)(one), layer(other)
    assert made.shape == expected.shape
    torch.testing.assert_close(made, expected)
    made.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_a_view_in_another_order() -> None:
    layer = nn.Linear(7, 5).requires_grad_(False)
    rows = torch.randn(7, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(linear.OneDNNForward(layer)(rows), layer(rows))


def test_losses_and_gradients_are_those_of_torch(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).train()
    base.eval()
    inputs = labelled(ROWS, [3, 0, 1, 5, 2])
    made = loss_and_gradients(model, inputs, None)
    assert calls
    calls.clear()
    monkeypatch.setattr(linear, "_AVAILABLE", False)
    assert_same(made, loss_and_gradients(model, inputs, None))
    assert not calls


@pytest.mark.parametrize("method", ["lora", "hydralora", "dora", "ia3"])
def test_what_a_method_adds_trains_as_before(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_llama(), METHODS[method]()).train()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    inputs = labelled(ROWS, [0] * 5)
    made = loss_and_gradients(model, inputs, None)
    monkeypatch.setattr(linear, "_AVAILABLE", False)
    assert_same(made, loss_and_gradients(model, inputs, None))


@pytest.mark.parametrize("name", ["PT", "PT-MoE selective probationary"])
def test_decoding_goes_through_it_to_the_tokens_of_generate(name: str, calls: list[tuple[int, ...]]) -> None:
    model = prompted(tiny_llama(), CONFIGS[name]).eval()
    expected = generated(model)
    assert not calls  # whose logits are those of torch
    assert decoded(Decoder(model)) == expected
    assert calls


class Doubled(nn.Linear):
    """A layer of its own, as those that quantize what they read."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_or_a_bias_that_trains_computes_itself() -> None:
    base = tiny("qwen2").requires_grad_(False)
    every = set(replaced(base))
    base.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    base.lm_head.__class__ = Doubled
    assert every - set(replaced(base)) == {"model.layers.0.self_attn.q_proj", "lm_head"}


def test_only_frozen_layers_in_float32_that_nothing_else_has_changed() -> None:
    base = tiny_llama().requires_grad_(False)
    every = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    assert set(replaced(base)) == every
    assert not any("forward" in vars(module) for module in base.modules())  # as it was before
    base.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert set(replaced(base)) == every - {"model.layers.0.mlp.up_proj"}
    base.lm_head.forward = base.lm_head.forward  # as accelerate's hooks do
    assert set(replaced(base)) == every - {"model.layers.0.mlp.up_proj"}  # still there, and its own
    with use_onednn(base):
        assert not isinstance(base.lm_head.forward, linear.OneDNNForward)
    assert not replaced(tiny("llama").requires_grad_(False).to(torch.bfloat16))
    assert not replaced(tiny("llama").requires_grad_(False).double())


def test_not_where_layers_are_recomputed_compiled_or_under_autocast() -> None:
    base = tiny_llama().requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not replaced(base)
    base.activation_checkpointing_enable()
    assert not replaced(base)
    base.activation_checkpointing_disable()
    assert replaced(base)
    base.model.layers[0].compile()
    assert not replaced(base)
