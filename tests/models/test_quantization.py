"""Bases whose linear layers' weights are in 8 or 4 bits: what passes through them, and which methods they take."""

import importlib.util
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ptmoe
from ptmoe.compare import prepare, read_plan
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, method_named, shelf
from ptmoe.methods.base import QUANTIZATIONS, quantization_of
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base, load_tokenizer, quiet
from ptmoe.train import TrainOptions, train
from testing.bases import tiny
from testing.losses import answers
from testing.shelf import OF_SHORT, OF_TYPE

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of how the methods are to be trained
quiet()

FIELDS = {
    "pt": {"num_virtual_tokens": 4},
    "pt-moe": {"num_virtual_tokens": 4, "num_experts": 3, "rank": 4},
    "dpt": {"num_virtual_tokens": 4, "rank": 2},
    "smop": {"num_virtual_tokens": 4},
    "attempt": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "multitask-prompt-tuning": {"num_virtual_tokens": 4, "rank": 2},
    "ulpt": {"num_virtual_tokens": 4, "rank": 6},
    "mept": {"num_virtual_tokens": 4},
    "vera": {"rank": 8},
    **OF_SHORT,
    **{f"peft:{kind}": fields for kind, fields in OF_TYPE.items()},
}
UNFIT = [(method, quantization) for method in METHODS for quantization in METHODS[method].unsupported_quantizations]
FITS = [(method, one) for method in METHODS for one in QUANTIZATIONS if (method, one) not in UNFIT]
either = pytest.mark.parametrize("quantization", QUANTIZATIONS)

TRAINING = {name: value.cpu() for name, value in answers().items()}  # where `load_base` puts a base


@pytest.fixture
def saved(tmp_path):
    """The folder of a tiny base, without dropout, by architecture."""

    def save(architecture="llama"):
        folder = tmp_path / architecture
        dropout = {"dropout": 0.0} if architecture == "opt" else {}
        tiny(architecture, **dropout).save_pretrained(folder)
        load_tokenizer("nano")[0].save_pretrained(folder)
        return str(folder)

    return save


def dequantized(folder, quantization):
    """The same base with plain weights: those that the quantized ones stand for."""
    base, _ = load_base(folder, quantization=quantization)
    base = base.dequantize(torch.float32)
    base.hf_quantizer = None
    return base


def attached(base, method):
    """A fresh adapter, every number of it moved, in training but for dropout."""
    model = attach(base, method_named(method)(**FIELDS.get(method, {})), seed=1, batches=[TRAINING])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def gradients(model):
    """The loss on a batch and what it gives each trained number, the router's noise the same every time."""
    torch.manual_seed(0)
    loss = model(**TRAINING).loss
    loss.backward()
    return loss.detach(), {name: one.grad for name, one in model.encoder.named_parameters() if one.requires_grad}


def held(base):
    """Everything that a base computes with, 8-bit layers' scales and packed weights included."""
    return {name: value.clone() for name, value in base.state_dict().items()}


@either
@pytest.mark.parametrize("method", ["pt", "pt-moe", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi"])
@pytest.mark.ci
def test_loss_and_gradients_are_those_of_the_weights_that_the_quantized_ones_stand_for(
    saved, architecture, method, quantization
):
    folder = saved(architecture)
    base, _ = load_base(folder, quantization=quantization)
    assert quantization_of(base) == quantization
    assert sum("bitsandbytes" in type(module).__module__ for module in base.modules()) >= 8
    assert_close(gradients(attached(base, method)), gradients(attached(dequantized(folder, quantization), method)))


@pytest.mark.slow
@either
@pytest.mark.parametrize("kind", sorted(shelf.ON_QUANTIZED))
def test_types_of_peft_compute_with_the_weights_that_the_quantized_ones_stand_for(saved, kind, quantization):
    base, method = load_base(saved(), quantization=quantization)[0], f"peft:{kind}"
    before = held(base)
    model = attached(base, method)
    found = gradients(model)
    model.delete_adapter("default")
    assert_close(found, gradients(attached(dequantized(saved(), quantization), method)), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in held(base).items())


@pytest.mark.parametrize(("method", "quantization"), FITS)
@pytest.mark.ci
def test_every_method_that_fits_trains_after_a_pass_without_gradients_and_leaves_the_base_as_it_is(
    saved, method, quantization
):
    model = attached(load_base(saved(), quantization=quantization)[0], method)
    with torch.no_grad():
        model.eval()(**TRAINING)
    before = held(model.base_model)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss, found = gradients(model.train())
        assert any(gradient.abs().sum() > 0 for gradient in found.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {id(one) for one in model.encoder.parameters()}
    adapted = {name for name, one in model.base_model.named_parameters(remove_duplicate=False) if id(one) in trained}
    for name, value in held(model.base_model).items():
        if name not in adapted:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("method", "quantization"), UNFIT)
@pytest.mark.ci
def test_methods_that_do_not_fit_are_refused_by_name(saved, method, quantization, tmp_path):
    base, _ = load_base(saved(), quantization=quantization)
    before = held(base)
    with pytest.raises(PtmoeError, match=f"{method} does not work on a base of {quantization} weights"):
        attach(base, METHODS[method](), batches=[TRAINING])
    assert all(torch.equal(value, before[name]) for name, value in held(base).items())
    options = TrainOptions(task="nano/mixed", method={"name": method}, model="/no/folder", quantization=quantization)
    with pytest.raises(PtmoeError, match=f"{method} does not work"):
        train(options.replace(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@either
def test_only_linear_layers_are_quantized_and_parameters_are_counted_as_on_a_plain_base(saved, quantization):
    plain, _ = load_base(saved())
    base, _ = load_base(saved(), quantization=quantization)
    for given, own in (
        (base.get_input_embeddings(), plain.get_input_embeddings()),
        (base.get_output_embeddings(), plain.get_output_embeddings()),
        (base.model.norm, plain.model.norm),
    ):
        assert torch.equal(given.weight, own.weight)
    assert base.get_memory_footprint() < plain.get_memory_footprint()
    assert ptmoe.PromptedCausalLM(base).num_parameters() == ptmoe.PromptedCausalLM(plain).num_parameters()


@either
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_compute_in_the_dtype_of_the_base(saved, dtype, quantization):
    base, _ = load_base(saved(), dtype=dtype, quantization=quantization)
    given = []
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: given.append(output))
    model = attached(base, "pt")
    assert model(**TRAINING).loss.isfinite()
    assert str(given[0].dtype) == f"torch.{dtype}"
    if quantization == "4bit":
        assert base.model.layers[0].self_attn.q_proj.compute_dtype == base.dtype


@either
@pytest.mark.parametrize(("method", "architecture"), [("pt-moe", "llama"), ("lora", "llama"), ("lora", "gpt2")])
@pytest.mark.ci
def test_an_adapter_goes_from_a_quantized_base_to_the_plain_one_and_back(
    saved, method, architecture, quantization, tmp_path
):
    folder = saved(architecture)
    for source, target in ((quantization, None), (None, quantization)):
        first = attached(load_base(folder, quantization=source)[0], method)
        first.save_pretrained(tmp_path / str(source))
        here = ptmoe.load_adapter(load_base(folder, quantization=source)[0], tmp_path / str(source))
        there = ptmoe.load_adapter(load_base(folder, quantization=target)[0], tmp_path / str(source))
        assert_close(dict(there.encoder.tensors()), dict(first.encoder.tensors()), rtol=0, atol=0)
        with torch.no_grad():
            assert torch.equal(here(**TRAINING).logits, first.eval()(**TRAINING).logits)
            assert not torch.equal(there(**TRAINING).logits, here(**TRAINING).logits)


@either
@pytest.mark.ci
def test_a_base_that_was_saved_quantized_is_taken_as_it_is(saved, quantization, tmp_path):
    first, tokenizer = load_base(saved(), quantization=quantization)
    first.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    again, _ = load_base(str(tmp_path / "small"))
    assert quantization_of(again) == quantization
    assert_close(gradients(attached(again, "pt")), gradients(attached(first, "pt")))
    with pytest.raises(PtmoeError, match="ft does not work"):
        attach(load_base(str(tmp_path / "small"))[0], METHODS["ft"]())
    with pytest.raises(PtmoeError, match=f"is saved in {quantization} already"):
        load_base(str(tmp_path / "small"), quantization="4bit")


@either
@pytest.mark.slow
def test_a_run_on_nano_says_its_quantization_and_is_repeated_by_its_config(quantization, tmp_path):
    options = TrainOptions(
        task="nano/mixed",
        method={"name": "pt-moe", "num_virtual_tokens": 4, "num_experts": 2, "rank": 2},
        quantization=quantization,
        max_steps=3,
        max_examples=64,
        eval_examples=4,
        output_dir=str(tmp_path / "run"),
    )
    trained = train(options, say=lambda line: None)
    assert quantization_of(trained.model.base_model) == quantization
    written = json.loads((tmp_path / "run" / "eval" / "nano__mixed.json").read_text())
    assert written["settings"]["quantization"] == quantization
    again = TrainOptions.read(tmp_path / "run" / "config.yaml", output_dir=str(tmp_path / "again"))
    assert again.quantization == quantization
    for name, value in train(again, say=lambda line: None).model.encoder.tensors().items():
        assert torch.equal(value, trained.model.encoder.tensors()[name])


@either
def test_compare_leaves_out_what_does_not_fit(quantization, tmp_path):
    methods = ["pt", "ft", "lora", "dora", "pissa"]
    plan = {"tasks": ["nano/mixed"], "methods": methods, "quantization": quantization}
    comparison = prepare(read_plan(None, {**plan, "output_dir": str(tmp_path / "c")}), say=lambda line: None)
    assert {cell.options.quantization for cell in comparison.cells} == {quantization}
    unfit = {one for one in methods if quantization in METHODS[one].unsupported_quantizations}
    assert {one.what for one in comparison.left_out} == unfit


def test_bad_input_is_said(saved, tmp_path, monkeypatch):
    with pytest.raises(PtmoeError, match="unknown quantization '4bits'; did you mean '4bit'"):
        load_base("nano", quantization="4bits")
    with pytest.raises(PtmoeError, match="quantization='2bit'"):
        TrainOptions(task="nano/mixed", quantization="2bit")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = r"quantization='4bit' needs bitsandbytes: pip install 'ptmoe\[quantization\]'"
    with pytest.raises(PtmoeError, match=said):
        load_base("nano", quantization="4bit")
    options = TrainOptions(task="nano/mixed", quantization="4bit", output_dir=str(tmp_path / "run"))
    with pytest.raises(PtmoeError, match=said):
        train(options)
    assert not (tmp_path / "run").exists()
