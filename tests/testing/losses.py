"""Losses and gradients of a padded batch, computed in different ways and compared."""

import torch
from torch import Tensor

from ptmoe.fast.loss import IGNORED
from ptmoe.models.causal import PromptedCausalLM
from testing.bases import batch, tokens

ROWS = [tokens(n, seed=n) for n in (9, 24, 5, 17, 24)]  # beyond and within a sliding window of 12


def labelled(rows: list[Tensor], lefts: list[int], supervised: int = 2) -> dict[str, Tensor]:
    """A batch whose last tokens of each row are supervised; `lefts` is the padding on each row's left."""
    ids, mask = batch(rows, lefts)
    labels = torch.full_like(ids, IGNORED)
    for row, (row_tokens, left) in enumerate(zip(rows, lefts, strict=True)):
        end = left + len(row_tokens)
        labels[row, end - supervised : end] = ids[row, end - supervised : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answers() -> dict[str, Tensor]:
    """Four rows with answers, padded on both sides."""
    lefts = [0, 2, 0, 1]
    rows = [tokens(length, length) for length in (9, 5, 7, 6)]
    ids, mask = batch(rows, lefts)
    labels = torch.where(mask.bool(), ids, IGNORED)
    for row, (row_tokens, left) in enumerate(zip(rows, lefts, strict=True)):
        labels[row, : left + len(row_tokens) // 2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits_of(model: PromptedCausalLM) -> Tensor:
    """Of the real tokens of `answers`."""
    inputs = answers()
    mask = inputs["attention_mask"]
    return model(inputs["input_ids"], mask).logits[mask.bool()]


def losses_of_steps(model: PromptedCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Of training on `answers`, in which the base stays without dropout."""
    model.encoders.train()
    model.training = True
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**answers()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def checkpointed_gradients(model: PromptedCausalLM, inputs: dict[str, Tensor]) -> list[list[Tensor | None]]:
    """Of the adapter's parameters, without and with gradient checkpointing."""
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.train().zero_grad()
        torch.manual_seed(0)
        model(**inputs).loss.backward()
        gradients.append([parameter.grad for parameter in model.encoder.parameters()])
    return gradients


def loss_and_gradients(model: PromptedCausalLM, inputs: dict[str, Tensor], packing: bool | None) -> dict[str, Tensor]:
    model.packing = packing
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert first.keys() == second.keys()
    assert len(first) > 1
    for name in first:
        scale = max(float(second[name].abs().max()), 1e-3)
        assert float((first[name] - second[name]).abs().max()) <= tolerance * scale, name
