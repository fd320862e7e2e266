"""Every type that `peft` lists, by its own name: it is a method, or says why it is none."""

import pickle
import warnings
from dataclasses import fields

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ptmoe
from ptmoe.compare.budget import fit_budget
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, method_named, shelf
from ptmoe.methods.base import QUANTIZATIONS
from ptmoe.models.attach import attach, count_parameters, load_adapter
from ptmoe.models.bases import load_base
from ptmoe.train.options import method_config, method_entry
from testing.bases import batch, tiny, tiny_llama, tokens
from testing.losses import answers, checkpointed_gradients, logits_of, losses_of_steps
from testing.shelf import OF_SHORT, OF_TYPE

TRAINING = answers()
ROWS, LEFTS = [tokens(6, 1), tokens(3, 2), tokens(8, 3)], [1, 4, 0]
TYPES = list(shelf.peft_types())
REFUSED = {  # by peft 0.21, and the words that say why
    **dict.fromkeys(("PROMPT_TUNING", "CPT"), "virtual tokens are put in place here, not by peft: take pt"),
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), "take prefix-tuning"),
    "P_TUNING": "take p-tuning",
    "MULTITASK_PROMPT_TUNING": "take multitask-prompt-tuning",
    **dict.fromkeys(("ADALORA", "POLY", "SHADOW", "XLORA"), "part of it is in peft's own forward pass"),
    "LILY": "its router averages over all rows of a batch",
    "TRAINABLE_TOKENS": "changes the base's embedding",
}
USABLE = [kind for kind in TYPES if kind not in REFUSED]
WHILE_IT_IS_QUICK = [
    kind if kind in ("LN_TUNING", "VBLORA") else pytest.param(kind, marks=pytest.mark.slow) for kind in USABLE
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice for those who call peft themselves
        yield


def config_of(kind, **changes):
    return method_named(f"peft:{kind}")(**(OF_TYPE.get(kind, {}) | changes))


def drawn(kind, base=None):
    """An adapter with every number moved from its start."""
    model = attach(tiny_llama() if base is None else base, config_of(kind), seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def after_steps(model, steps=3):
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    return losses_of_steps(model, optimizer, steps)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.ci
def test_every_type_of_peft_works_or_says_why_it_does_not(kind, tmp_path):
    """Attached, counted, trained, saved, loaded here and by plain peft, switched off and taken out again."""
    if kind in REFUSED:
        with pytest.raises(PtmoeError, match=REFUSED[kind]):
            attach(tiny_llama(), config_of(kind))
        return
    base = tiny_llama()
    own = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    untouched = logits_of(attach(tiny_llama(), METHODS["lora"]()).eval())
    model = attach(base, config_of(kind), seed=1)
    assert count_parameters(base.config, config_of(kind)) == model.num_parameters(only_trainable=True) > 0
    losses = after_steps(model)
    assert losses[-1] < losses[0]
    trained = logits_of(model)
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    assert again.method_config == model.method_config
    assert torch.equal(logits_of(again), trained)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    rows = torch.stack([tokens(8, 1), tokens(8, 2)])
    assert_close(theirs(input_ids=rows).logits, model(rows).logits, atol=1e-5, rtol=0)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), untouched)
    assert torch.equal(logits_of(model), trained)
    model.delete_adapter("default")
    assert all(torch.equal(parameter, before) for parameter, before in own)
    assert [id(parameter) for parameter in base.parameters()] == [id(parameter) for parameter, _ in own]
    assert torch.equal(logits_of(model), untouched)
    assert "peft_config" not in vars(base)


@pytest.mark.parametrize("kind", WHILE_IT_IS_QUICK)
def test_a_row_is_alone_in_its_batch_and_the_loss_is_that_of_the_logits(kind):
    model = drawn(kind).eval()
    ids, mask = batch(ROWS, LEFTS, 10)
    logits = model(ids, mask).logits
    made = model.generate(ids, mask, max_new_tokens=4, do_sample=False)
    for i, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
        assert_close(logits[i, left : left + len(row)], model(row[None]).logits[0], atol=1e-5, rtol=0)
        assert torch.equal(made[i, -4:], model.generate(row[None], max_new_tokens=4, do_sample=False)[0, -4:])
    assert_close(model(**TRAINING, skip_logits=True).loss, model(**TRAINING, skip_logits=False).loss)
    assert_close(*checkpointed_gradients(model, TRAINING), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", WHILE_IT_IS_QUICK)
def test_on_a_bfloat16_base_what_trains_is_float32(kind, tmp_path):
    base = tiny_llama().to(torch.bfloat16)
    if kind == "ADAPTION_PROMPT":
        with pytest.raises(PtmoeError, match=r"would train in torch\.bfloat16: load the base in float32"):
            attach(base, config_of(kind))
        return
    model = drawn(kind, base).train()
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    model(**TRAINING).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())
    model.eval().save_pretrained(tmp_path)
    again = load_adapter(tiny_llama().to(torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.ci
def test_gpt2_is_changed_or_refused_by_the_kind_of_its_layers():
    fits = {"LORA", "FOURIERFT", "PVERA", "RANDLORA", "TINYLORA", "VBLORA", "LN_TUNING", "VERA", "IA3"}
    for kind in sorted(fits | {"SHIRA", "ROAD", "C3A", "BEFT", "OSF"}):
        base = tiny("gpt2")
        modules = {name: id(module) for name, module in base.named_modules()}
        if kind in fits:
            model = attach(base, config_of(kind), seed=1)
            assert count_parameters(base.config, config_of(kind)) == model.num_parameters(only_trainable=True), kind
            losses = after_steps(model)
            assert losses[-1] < losses[0], kind
            model.delete_adapter("default")
        else:
            with pytest.raises(PtmoeError, match=r"Conv1D|no default modules|none of the modules that it changes"):
                attach(base, config_of(kind))
        assert {name: id(module) for name, module in base.named_modules()} == modules, kind


@pytest.mark.parametrize(
    "config", [*map(config_of, USABLE), *(METHODS[short](**OF_SHORT[short]) for short in OF_SHORT)]
)
def test_a_config_can_be_sent_to_another_process(config):
    sent = pickle.loads(pickle.dumps(config))
    assert type(sent) is type(config)
    assert sent == config


@pytest.mark.parametrize("short", shelf.SHORT)
def test_a_short_form_is_its_type_with_other_defaults(short):
    entry, config = shelf.SHORT[short], METHODS[short]
    assert config.method == short
    plain = method_named(f"peft:{entry.type}")
    assert config.model_fields.keys() == plain.model_fields.keys() >= entry.defaults.keys()
    assert config.default_learning_rate == plain.default_learning_rate == entry.learning_rate
    assert config().model_dump() == plain(**entry.defaults).model_dump()


@pytest.mark.parametrize("kind", WHILE_IT_IS_QUICK)
def test_more_of_the_free_size_is_more_numbers(kind):
    config_class = method_named(f"peft:{kind}")
    for name in config_class.free_sizes:
        others = {key: value for key, value in OF_TYPE.get(kind, {}).items() if key != name}
        counts = [count_parameters(tiny_llama().config, config_class(**{name: size}, **others)) for size in (2, 4)]
        assert counts[0] < counts[1]
        picked = fit_budget(tiny_llama().config, config_class, counts[1] - 1, others)
        assert count_parameters(tiny_llama().config, picked) < counts[1]


def test_names_are_read_in_any_spelling_and_fields_behind_them():
    assert method_entry("peft:pvera:r=8,d_initial=0.2") == {"name": "peft:pvera", "r": 8, "d_initial": 0.2}
    assert method_entry("PEFT:LN_Tuning") == method_entry({"name": "peft:ln-TUNING"}) == {"name": "peft:ln-tuning"}
    assert method_entry("pt-moe:rank=8") == {"name": "pt-moe", "rank": 8}
    config = method_config(method_entry("peft:Pvera:r=8"))
    assert (config.method, config.r, config.peft_type) == ("peft:pvera", 8, "PEFT:PVERA")
    assert type(config) is method_named("peft:PVERA")


def test_what_a_type_would_do_beyond_its_own_numbers_is_not_offered():
    offered = {kind: method_named(f"peft:{kind}") for kind in USABLE}
    for kind, config_class in offered.items():
        withheld = {field.name for field in fields(config_class.peft_class)} - config_class.model_fields.keys()
        for name in withheld:
            with pytest.raises(PtmoeError, match=f"{name} of peft's .* is not offered"):
                config_class(**OF_TYPE.get(kind, {}), **{name: None})


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("peft:pverra", "peft has no method 'peft:pverra'; did you mean 'peft:pvera'"),
        ("peft:", "peft has no method 'peft:'"),
        ("peft", "unknown method 'peft'"),
        ("pverra", "unknown method 'pverra'; did you mean 'pvera'"),
        ("lroa", "unknown method 'lroa'; did you mean 'lora'"),
        ("peft:xlora", "peft:xlora cannot be used: part of it is in peft's own forward pass"),
        ("peft:pvera:rank=3", "peft:pvera: unknown key 'rank'"),
        ("peft:pvera:d_intial=3", "unknown key 'd_intial'; did you mean 'd_initial'"),
        ("peft:pvera:r=many", "r='many': input should be a valid integer"),
        ("peft:pvera:r=0", "r=0: input should be greater than or equal to 1"),
        ("peft:adaption-prompt", "adapter_layers is missing"),
        ("peft:vblora:topk=none", "topk='none': input should be a valid integer"),
        ("peft:road:variant=road_9", "peft:road: peft refuses these settings: Invalid variant"),
        ("peft:lora:init_lora_weights=pissa", "init_lora_weights of peft's LoraConfig is not offered .*take pissa"),
    ],
)
def test_bad_input_is_refused_in_words(method, message):
    with pytest.raises(PtmoeError, match=message):
        method_config(method_entry(method))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("C3A", {"block_size": 5}, "peft refuses peft:c3a on LlamaForCausalLM: .*should be a factor of"),
        ("FOURIERFT", {"n_frequency": 10_000}, "peft refuses peft:fourierft on LlamaForCausalLM: .*n_frequency"),
        ("PVERA", {"target_modules": ["q_porj"]}, "has no module 'q_porj': .*q_proj"),
        ("LN_TUNING", {"target_modules": ["q_proj", "lm_head"]}, "changes the base's embedding"),
    ],
)
def test_what_does_not_fit_a_base_leaves_it_as_it_was(kind, fields, message):
    base = tiny_llama()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(PtmoeError, match=message):
        attach(base, config_of(kind, **fields))
    assert {name: id(module) for name, module in base.named_modules()} == modules
    attach(base, METHODS["lora"]())


def test_a_type_that_rewrites_the_base_is_caught(monkeypatch):
    """Should a later peft have one: its start is PiSSA's here."""
    monkeypatch.setattr(shelf.ShelfConfig, "initial_peft_config", lambda self, **common: peft.LoraConfig(
        **common, init_lora_weights="pissa"))  # fmt: skip
    with pytest.raises(PtmoeError, match="peft:lora has rewritten the base's own weights"):
        attach(tiny_llama(), config_of("LORA"))


def test_quantized_bases_are_taken_by_types_that_have_layers_for_them():
    taken = {kind for kind in USABLE if not method_named(f"peft:{kind}").unsupported_quantizations}
    assert taken == shelf.ON_QUANTIZED
    assert not taken & {"OSF", "DEFT", "HRA", "PEANUT", "TINYLORA", "UNILORA"}
    for quantization in QUANTIZATIONS:
        with pytest.raises(PtmoeError, match=f"osf does not work on a base of {quantization} weights"):
            METHODS["osf"].check_quantization(quantization)


PADDING = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}


@pytest.mark.parametrize("config", [METHODS["eva"](), METHODS["corda"](), METHODS["pt"](init="examples")])
@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.zeros(2, 0, dtype=torch.long)}], [PADDING]])
def test_a_start_from_data_that_is_empty_is_refused(config, batches):
    base = tiny_llama()
    with pytest.raises(PtmoeError, match=f"{config.method} starts from training data, of which"):
        attach(base, config, batches=batches)
    attach(base, config, batches=[TRAINING])


def test_the_shelf_is_part_of_what_users_import():
    assert ptmoe.METHODS["pvera"] is METHODS["pvera"]
    assert set(shelf.SHORT) < set(METHODS)
    assert list(METHODS) == sorted(METHODS, key=lambda name: (METHODS[name].order, name))


def test_a_saved_adapter_of_numbers_where_indices_belong_is_refused(tmp_path):
    attach(tiny_llama(), config_of("SHIRA")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key, value in tensors.items():
        other = value.float() if not value.is_floating_point() else value.long()
        save_file(tensors | {key: other}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(PtmoeError, match=r"has dtype .*: needs torch"):
            load_adapter(tiny_llama(), tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load_adapter(tiny_llama(), tmp_path)


def test_the_command_line_has_a_types_own_options(run):
    assert "--hira-dropout" in run("train", "--method", "peft:HIRA", "--help")[1]
    count = count_parameters(load_base("nano")[0].config, config_of("PVERA", r=3))
    status, out, _ = run("params", "--method", "PEFT:pvera:r=3")
    assert status == 0
    assert f"{count:,}" in out
    assert "r=3" in out
    status, out, _ = run("params", "--method", "pvera", "--budget", "4k")
    assert status == 0
    assert "r=" in out
    for arguments, message in (
        (("params", "--method", "peft:pverra"), "did you mean 'peft:pvera'"),
        (("params", "--method", "peft:pvera:rr=3"), "peft:pvera has no rr"),
        (("train", "--task", "nano/mixed", "--method", "peft:poly"), "part of it is in peft's own forward pass"),
        (("train", "--task", "nano/mixed", "--method", "peft:hira", "--r", "0"), "r=0: input should be greater"),
        (("compare", "--task", "nano/mixed", "--method", "peft:hira:rank=2"), "unknown key 'rank'"),
    ):
        status, _, err = run(*arguments)
        assert (status, message in err) == (2, True), err
