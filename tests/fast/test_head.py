"""No linear layer of a base multiplies rows with gaps between them, which is slow (`ptmoe.fast.linear`)."""

from collections.abc import Iterator

import pytest
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.evaluate.choices import likelihoods
from ptmoe.models.decoding import Decoder
from testing.bases import CONFIGS, batch, prompted, tokens
from testing.decoding import ROWS, decoded
from testing.losses import labelled, loss_and_gradients


@pytest.fixture
def gaps(base: PreTrainedModel) -> Iterator[list[str]]:
    """The linear layers that read rows with gaps between them."""
    seen: list[str] = []

    def look(name: str):
        def note(_: nn.Module, arguments: tuple[Tensor, ...], __: Tensor) -> None:
            if arguments[0].numel() and not arguments[0].is_contiguous():
                seen.append(name)

        return note

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_in_decoding(base: PreTrainedModel, gaps: list[str]) -> None:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).eval()
    decoded(Decoder(model))
    ids, mask = batch([tokens(9), tokens(4, 1)], [0, 5])
    model.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert not gaps


def test_in_scoring_labels(base: PreTrainedModel, gaps: list[str]) -> None:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).eval()
    likelihoods(model, ROWS[:2], [{"one": [3, 4], "two": [5]}] * 2, 4)
    assert not gaps


@pytest.mark.parametrize("packing", [True, False])
def test_in_training(base: PreTrainedModel, gaps: list[str], packing: bool) -> None:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).train()
    loss_and_gradients(model, labelled([tokens(9), tokens(4, 1)], [0, 5]), packing)
    assert not gaps
