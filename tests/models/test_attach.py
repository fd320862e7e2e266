"""Adapters on a base: what becomes active, what trains, and a run loaded in one call."""

import pytest
import torch
from bases import CONFIGS, prompted, tiny_llama, tokens

import ptmoe
from ptmoe.models.attach import load_run
from ptmoe.models.bases import load_base, place


def test_an_adapter_that_is_loaded_beside_another_is_neither_active_nor_training(base, tmp_path):
    """As in peft: serving code adds adapters while another one trains."""
    prompted(base, CONFIGS["DPT"]).save_pretrained(tmp_path)
    model = prompted(base, CONFIGS["PT"], name="trained").train()
    ids = tokens(6)[None]
    labels = ids.clone()
    labels[:, :3] = -100
    model(ids, labels=labels).loss.backward()
    gradient = model.encoder.prompt.grad.clone()
    ptmoe.load_adapter(model, tmp_path, name="added")
    assert model.active_adapter == "trained"
    assert torch.equal(model.encoder.prompt.grad, gradient)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "encoders.trained.prompt"
    ]
    model.set_adapter("added")
    assert not model.encoders["trained"].prompt.requires_grad
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


def test_the_first_adapter_is_active(tmp_path):
    prompted(tiny_llama(), CONFIGS["PT"]).save_pretrained(tmp_path)
    assert ptmoe.load_adapter(tiny_llama(), tmp_path, name="only").active_adapter == "only"


def test_a_run_is_loaded_with_its_base_tokenizer_and_chat_setting(tmp_path):
    base, _ = load_base("nano")
    model = ptmoe.attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_run(tmp_path, device="cpu")
    assert loaded.chat is None
    assert not loaded.model.training
    assert loaded.model.name_or_path == "nano"
    (tmp_path / "config.yaml").write_text("chat: true\n")
    loaded = load_run(tmp_path, dtype="bfloat16", device="cpu")
    assert loaded.chat is True
    assert loaded.model.dtype == torch.bfloat16
    ids = loaded.tokenizer("2 and 3", return_tensors="pt")["input_ids"]
    assert loaded.model(ids).logits.shape[1] == ids.shape[1]


def test_a_device_that_is_not_there_is_refused_in_words():
    assert place("cpu") == torch.device("cpu")
    with pytest.raises(ptmoe.PtmoeError, match="device 'nowhere' cannot be used on this machine"):
        place("nowhere")
    with pytest.raises(ptmoe.PtmoeError, match="device 'nowhere' cannot be used on this machine"):
        load_base("nano", device="nowhere")


def test_by_default_commands_use_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    assert place() == torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert place() == torch.device("cpu")
