"""Methods that change the base's layers, and the prompts whose encoders are peft's."""

import json
import pickle
import pkgutil
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import TrainingArguments

import ptmoe
from ptmoe.adapters.folder import read_adapter
from ptmoe.adapters.identity import FINGERPRINT_SIZE
from ptmoe.adapters.peft import to_peft
from ptmoe.evaluate.choices import likelihoods
from ptmoe.methods import METHODS, PiSSAConfig, PTConfig, method_named
from ptmoe.methods.injected import Injected, InjectedConfig
from ptmoe.methods.parts import PartsConfig
from ptmoe.models.attach import attach, count_parameters, load_adapter
from ptmoe.models.decoding import Decoder
from ptmoe.train import PromptTrainer
from ptmoe.train.data import collate
from testing.architectures import POSITIONS
from testing.bases import DEVICE, array, batch, tiny, tiny_llama, tokens
from testing.losses import answers, checkpointed_gradients, logits_of, losses_of_steps

ARCHITECTURES = ["llama", "gpt2", "opt", "phi", "gpt_neox"]
SIZES = {
    "ft": {},
    "lora": {"rank": 2},
    "hydralora": {"rank": 2, "num_experts": 3},
    "lora-xs": {"rank": 2},
    "svfit": {"rank": 4},
    "sorsa": {"rank": 2},
    "soka": {"rank": 2},
    "edora": {"rank": 2},
    "goat": {"rank": 2, "num_experts": 3},
    "bilora": {"rank": 2},
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "eva": {"rank": 2},
    "corda": {"rank": 2},
    "kasa": {"rank": 2},
    "riemannian": {"rank": 2},
    "lora-fa": {"rank": 2},
    "ffa-lora": {"rank": 2},
    "ba-lora": {"rank": 2},
    "nlora": {"rank": 2},
    "nora": {"rank": 8},
    "msplora": {"rank": 4},
    "lotr": {"rank": 2},
    "compacter": {"width": 2, "rank": 2},
    "vera": {"rank": 8},
    "ia3": {},
    "pt-moe-road": {"num_virtual_tokens": 4, "num_experts": 3, "rank": 3},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix-tuning": {"num_virtual_tokens": 4},
    "multitask-prompt-tuning": {"num_virtual_tokens": 4, "rank": 2},
    "mept": {"num_virtual_tokens": 4, "num_experts": 3},
}
WEIGHTS = [method for method in SIZES if METHODS[method].changes_layers]
PARTS = [method for method in SIZES if issubclass(METHODS[method], PartsConfig)]
IN_PEFT = [method for method in SIZES if issubclass(METHODS[method], InjectedConfig) or method == "prefix-tuning"]
REWRITES = {  # the target modules' own weights, before training
    method for method in IN_PEFT if getattr(METHODS[method], "encoder_class", Injected).rewrites_weights
}
FITS = [
    (method, architecture)
    for method in SIZES
    # One method of each base class is tried on all of them.
    for architecture in (["llama", "gpt2"] if method in (*PARTS, "sorsa") and method != "hydralora" else ARCHITECTURES)
    if (method, architecture) != ("kasa", "gpt2")
]
all_methods = pytest.mark.parametrize("method", SIZES)
weight_side = pytest.mark.parametrize("method", WEIGHTS)
wherever_it_fits = pytest.mark.parametrize(
    ("method", "architecture"),
    [pytest.param(*fit, marks=pytest.mark.ci if fit[1] == "gpt2" else ()) for fit in FITS],
)


TRAINING = answers()


def attached(method, base=None, **fields):
    base = tiny_llama() if base is None else base
    return attach(base, METHODS[method](**(SIZES[method] | fields)), seed=1, batches=[TRAINING])


def trained(method, base=None, steps=4, **fields):
    """After some steps on one batch, and the losses."""
    model = attached(method, base, **fields)
    rate = 3e-3 if method in ("ft", "p-tuning", "bilora") else 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = model.encoder.optimizer(rate, 0.0)
    optimizer = optimizer or torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    return model, losses_of_steps(model, optimizer, steps)


# -- what is counted and trained ---------------------------------------------------------------------------------------


@all_methods
def test_the_count_from_the_config_is_that_of_the_model(method):
    model = attached(method)
    assert count_parameters(model.config, model.method_config) == model.num_parameters(only_trainable=True)


def test_full_fine_tuning_counts_tied_weights_once():
    for tied in (True, False):
        base = tiny_llama(tie_word_embeddings=tied)
        assert count_parameters(base.config, METHODS["ft"]()) == sum(one.numel() for one in base.parameters())


@wherever_it_fits
def test_training_lowers_the_loss_and_changes_the_methods_own_numbers_alone(method, architecture):
    base = tiny(architecture)
    own = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    model, losses = trained(method, base, num_virtual_tokens=8) if method == "p-tuning" else trained(method, base)
    assert losses[-1] < losses[0]
    unchanged = [torch.equal(parameter, before) for parameter, before in own]
    assert all(unchanged) or method in REWRITES | {"ft"}
    if method == "ft":
        assert not any(torch.equal(parameter, before) for parameter, before in own if before.dim() > 1)
    elif METHODS[method].changes_layers:
        model.delete_adapter("default")
        assert all(torch.equal(parameter, before) for parameter, before in own)
        assert {id(parameter) for parameter in base.parameters()} == {id(parameter) for parameter, _ in own}


@weight_side
def test_checkpoints_hold_each_trained_or_frozen_number_once_and_nothing_of_the_base(method):
    model = attached(method)
    state = model.state_dict()
    assert len(state.pop("base_fingerprint")) == 1 + FINGERPRINT_SIZE  # which base it is
    saved = sum(value.numel() for value in state.values())
    frozen = sum(buffer.numel() for buffer in model.encoder.buffers())
    assert saved == sum(one.numel() for one in model.parameters() if one.requires_grad) + frozen
    assert not frozen or method in PARTS
    assert all(key.startswith("encoders.default.") for key in state)
    assert model.num_virtual_tokens == 0


@pytest.mark.parametrize("method", [*WEIGHTS, "prefix-tuning", "mept"])
def test_a_seed_decides_the_start_and_leaves_the_global_state_alone(method):
    before = torch.get_rng_state()
    first, again = (attached(method).encoder.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[key], value) for key, value in first.items())


@pytest.mark.parametrize("method", ["lora", "hydralora", "vera", "dora", "ia3", "soka", "edora", "bilora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_trains_stays_float32_on_a_bfloat16_base(method, autocast):
    model = attached(method, tiny_llama().to(torch.bfloat16)).train()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = model(**TRAINING).loss
    loss.backward()
    assert loss.isfinite()
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())


@pytest.mark.parametrize("method", ["nlora", "soka", "goat"])
def test_a_small_difference_of_large_products_is_whole_in_mixed_precision(method):
    encoder, generator = attached(method).encoder, torch.Generator().manual_seed(1)
    module, part = encoder.targets[0]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1 + 1e-3 * torch.randn(parameter.shape, generator=generator).to(DEVICE))
    x = torch.randn(5, module.in_features, generator=generator).to(DEVICE)
    expected = part(x, module(x), module)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_close(part(x, module(x), module), expected)


def test_full_fine_tuning_of_a_bfloat16_base_is_in_float32():
    model = attached("ft", tiny_llama().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@weight_side
@pytest.mark.ci
def test_gradient_checkpointing_changes_no_gradient(method):
    assert_close(*checkpointed_gradients(attached(method), TRAINING), atol=1e-6, rtol=1e-5)


# -- padding and generation --------------------------------------------------------------------------------------------

ROWS, LEFTS = [tokens(6, 1), tokens(3, 2), tokens(8, 3)], [1, 4, 0]


@wherever_it_fits
def test_padding_on_any_side_gives_each_row_what_it_gets_alone(method, architecture):
    model, _ = trained(method, tiny(architecture), steps=2)
    ids, mask = batch(ROWS, LEFTS, 10)
    logits = model(ids, mask).logits
    made = model.generate(ids, mask, max_new_tokens=4, do_sample=False)
    for i, (row, left) in enumerate(zip(ROWS, LEFTS, strict=True)):
        assert_close(logits[i, left : left + len(row)], model(row[None]).logits[0], atol=1e-5, rtol=0)
        assert torch.equal(made[i, -4:], model.generate(row[None], max_new_tokens=4, do_sample=False)[0, -4:])


@pytest.mark.parametrize("method", ["lora", "hydralora", "prefix-tuning", "mept"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_takes_the_tokens_that_the_logits_say(method, architecture):
    model, _ = trained(method, tiny(architecture), steps=2)
    row = ROWS[0][None]
    made = model.generate(row, max_new_tokens=5, do_sample=False)
    for length in range(row.shape[1], made.shape[1]):
        readable = torch.arange(length, device=DEVICE)[None] < row.shape[1]
        assert model(made[:, :length], input_mask=readable).logits[0, -1].argmax() == made[0, length]


# -- saving and loading ------------------------------------------------------------------------------------------------


@wherever_it_fits
def test_a_saved_and_reloaded_adapter_gives_the_same_logits(method, architecture, tmp_path):
    model, _ = trained(method, tiny(architecture), steps=2)
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny(architecture), tmp_path)
    assert again.method_config == model.method_config
    if issubclass(METHODS[method], PiSSAConfig):  # the difference to their start, on the untouched base
        assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)
    else:
        assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(("method", "architecture"), [fit for fit in FITS if fit[0] in IN_PEFT])
@pytest.mark.ci
def test_plain_peft_loads_the_folder_with_the_same_logits(method, architecture, tmp_path):
    model, _ = trained(method, tiny(architecture), steps=2)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path).eval()
    rows = torch.stack([tokens(8, 1), tokens(8, 2)])
    assert_close(theirs(input_ids=rows).logits, model(rows).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_in_plain_peft_is_the_same_to_the_bit(architecture, tmp_path):
    model, _ = trained("lora", tiny(architecture))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path).eval()
    ids = torch.stack([tokens(8, 1), tokens(8, 2)])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(8, device=DEVICE)[None],
    }
    assert torch.equal(theirs(**given, use_cache=False).logits, model(ids).logits)


def test_a_lora_that_plain_peft_has_made_is_loaded(tmp_path):
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["o_proj", "q_proj"], lora_dropout=0.1)
    ).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(tiny_llama(), tmp_path)
    ids = tokens(8)[None]
    assert ours.method_config == METHODS["lora"](rank=3, alpha=5, target_modules=["o_proj", "q_proj"])
    assert_close(ours(ids).logits, theirs(input_ids=ids).logits, atol=1e-6, rtol=0)


def test_a_lora_of_peft_without_an_alpha_has_pefts_default(tmp_path):
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written.pop("lora_alpha") == 8
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    ids = tokens(8)[None]
    assert_close(load_adapter(tiny_llama(), tmp_path)(ids).logits, theirs(input_ids=ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("other", [{"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_lora_of_peft_that_is_more_than_lora_is_refused_by_name(other, tmp_path):
    form = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **other)
    peft.get_peft_model(tiny_llama(), form).save_pretrained(tmp_path)
    base = tiny_llama()
    with pytest.raises(ptmoe.PtmoeError, match=f"{next(iter(other))}=|unknown tensor"):
        load_adapter(base, tmp_path)
    attach(base, METHODS["lora"]())  # it is as it was


def test_other_adapters_that_plain_peft_has_made_are_named(tmp_path):
    peft.get_peft_model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="is a IA3 adapter that peft has saved"):
        load_adapter(tiny_llama(), tmp_path)


def test_full_fine_tuning_is_loaded_onto_the_base_it_started_from(tmp_path):
    model, _ = trained("ft")
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        name for name, _ in tiny_llama().named_parameters()
    }
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        load_adapter(tiny_llama(seed=5), tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        load_adapter(model.base_model.__class__(model.config), tmp_path)


@pytest.fixture
def folder(tmp_path):
    attached("lora").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def rewrite_config(folder, name="ptmoe_config.json", **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


DAMAGE = {
    "a missing tensor": (lambda f: rewrite_tensors(f, lambda t: t.pop(KEY)), "lacks the tensor .*v_proj.lora_B"),
    "an unknown tensor": (
        lambda f: rewrite_tensors(f, lambda t: t.update({KEY + "s": t[KEY].clone()})),
        "did you mean",
    ),
    "a NaN": (lambda f: rewrite_tensors(f, lambda t: t[KEY].fill_(float("nan"))), "v_proj.lora_B.weight holds NaN"),
    "another shape": (lambda f: rewrite_config(f, rank=3), r"shape \(2, 32\), its config says \(3, 32\)"),
    "another factor": (lambda f: rewrite_config(f, alpha=5), "lora_alpha=4 is not what lora has"),
    "another factor in peft's": (lambda f: rewrite_config(f, "adapter_config.json", lora_alpha=9), "lora_alpha=9"),
    "other modules": (lambda f: rewrite_config(f, target_modules=["k_proj"]), "lacks the tensor .*k_proj"),
    "modules that are not there": (lambda f: rewrite_config(f, target_modules=["c_attn"]), "'c_attn'.*q_proj, k_proj"),
    "an unknown key": (lambda f: rewrite_config(f, rnak=3), "did you mean 'rank'"),
    "a config that is not JSON": (lambda f: (f / "ptmoe_config.json").write_text("{"), "ptmoe_config.json is not JSON"),
    "a pickle beside it": (lambda f: (f / "adapter_model.bin").write_bytes(pickle.dumps({})), "pickles can run code"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name_and_leaves_the_base_as_it_was(damage, folder):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    base = tiny_llama()
    modules = {name: id(module) for name, module in base.named_modules()}
    with pytest.raises(ptmoe.PtmoeError, match=message):
        load_adapter(base, folder)
    assert {name: id(module) for name, module in base.named_modules()} == modules
    attach(base, METHODS["lora"]())


def test_another_base_is_refused_and_the_folder_needs_no_conversion(folder, tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        load_adapter(tiny_llama(seed=5), folder)
    with pytest.raises(ptmoe.PtmoeError, match="is peft's own already"):
        to_peft(folder, tmp_path / "peft")
    assert read_adapter(folder).config == METHODS["lora"](rank=2, target_modules=["q_proj", "v_proj"])


# -- training by the trainer -------------------------------------------------------------------------------------------


def data():
    rows = []
    for i in range(8):
        ids = tokens(5 + i % 4, i).cpu()
        labels = torch.where(torch.arange(len(ids)) > 2, ids, -100)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def fitted(method, folder, resume=None, size=2, accumulate=1, **arguments):
    options = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "logging_steps": 1} | arguments
    trainer = PromptTrainer(
        model=attached(method),
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            use_cpu=DEVICE.type == "cpu",
            report_to=[],
            disable_tqdm=True,
            **options,
        ),
        train_dataset=data(),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@all_methods
@pytest.mark.slow
def test_a_resumed_training_ends_where_an_undisturbed_one_does(method, tmp_path):
    through = fitted(method, tmp_path / "a")
    resumed = fitted(method, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = through.model.encoder.tensors()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.model.encoder.tensors().items())
    names = {path.name for path in (tmp_path / "a" / "checkpoint-2").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)


@pytest.mark.parametrize("method", ["ft", "lora", "hydralora", "kasa"])
@pytest.mark.slow
def test_splitting_a_batch_into_accumulation_steps_changes_nothing(method, tmp_path):
    sgd = {"optim": "sgd", "max_grad_norm": 0, "max_steps": 2, "save_strategy": "no"}
    whole = fitted(method, tmp_path, size=4, **sgd).model.encoder.tensors()
    parts = fitted(method, tmp_path, size=2, accumulate=2, **sgd).model.encoder.tensors()
    assert_close(parts, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "ft"])
@pytest.mark.ci
def test_no_step_copies_all_weights_of_the_base(method, tmp_path):
    trainer = fitted(method, tmp_path, max_steps=1, save_strategy="no")
    copied = sum(value.numel() for value in trainer._last_good)
    assert copied == (0 if method == "ft" else trainer.model.num_parameters(only_trainable=True))


@pytest.mark.parametrize("method", ["riemannian", "lora-fa"])
@pytest.mark.ci
def test_the_trainer_takes_the_methods_own_optimizer_and_another_is_told(method, tmp_path):
    own = fitted(method, tmp_path / "own", max_steps=1, save_strategy="no")
    name = type(own.optimizer.optimizer if hasattr(own.optimizer, "optimizer") else own.optimizer).__name__
    assert name in ("RiemannianPreconditionedOptimizer", "LoraFAOptimizer")
    with pytest.warns(UserWarning, match=f"{method} is an optimizer: another trains it as LoRA"):
        attached(method).train()(**TRAINING)


@pytest.mark.parametrize("method", ["pissa", "sorsa", "ba-lora"])
def test_a_loaded_adapter_that_trains_on_as_another_method_says_so(method, tmp_path):
    attached(method).save_pretrained(tmp_path)
    model = load_adapter(tiny_llama(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**TRAINING)
    with pytest.warns(UserWarning, match=f"a loaded {method} adapter is LoRA of rank"):
        model.train()(**TRAINING)


def test_lora_fa_trains_b_alone():
    start, model = attached("lora-fa"), trained("lora-fa")[0]
    for key, value in model.encoder.tensors().items():
        assert torch.equal(value, start.encoder.tensors()[key]) == ("lora_A" in key)
    with model.disable_adapter():
        pass
    assert all("lora_B" in name for name, one in model.named_parameters() if one.requires_grad)


@pytest.mark.parametrize("method", ["eva", "corda"])
@pytest.mark.slow
def test_a_start_that_needs_data_takes_it_from_the_training_data(method, tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match=f"this {method} starts from training data: .*`ptmoe train"):
        attach(tiny_llama(), METHODS[method]())
    options = {"task": "nano/mixed", "max_steps": 2, "per_device_train_batch_size": 8, "max_examples": 32}
    run = ptmoe.train.train(
        ptmoe.train.TrainOptions(**options, method={"name": method}, eval_examples=4, output_dir=str(tmp_path / "run")),
        say=lambda _: None,
    )
    again = load_adapter(ptmoe.models.bases.load_base("nano", device=run.model.device)[0], run.folder).eval()
    ids = tokens(8)[None].to(run.model.device)
    assert_close(again(ids).logits, run.model(ids).logits, atol=1e-4, rtol=0)
    assert run.result.trainable_parameters == count_parameters(run.model.config, METHODS["lora"]())
    settings = json.loads((run.folder / "eval" / "nano__mixed.json").read_text())["settings"]
    assert settings["adapter"] is not None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_a_checkpoint_brings_its_start_to_a_base_that_started_from_other_data(architecture):
    """As where a run is resumed by force: with another start the trained product would be added to other weights."""
    config, other = METHODS["corda"](rank=2), TRAINING | {"input_ids": TRAINING["input_ids"].flip(0, 1) // 2}
    model, again = (attach(tiny(architecture), config, batches=[of]).eval() for of in (TRAINING, other))
    for parameter in model.encoder.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter))
    ids, before = tokens(8)[None], {key: value.clone() for key, value in model.encoder.tensors().items()}
    again.encoder.load_tensors(before)
    assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert all(torch.equal(value, before[key]) for key, value in again.encoder.tensors().items())
    again.delete_adapter("default")
    assert torch.equal(again.base_model(ids).logits, tiny(architecture)(ids).logits)


# -- LoRA and HydraLoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_trains_on_the_loss_that_peft_and_transformers_have(architecture):
    ours = attached("lora", tiny(architecture))
    form = peft.LoraConfig(
        **{key: ours.encoder.peft_config()[key] for key in ("r", "lora_alpha", "target_modules", "fan_in_fan_out")}
    )
    theirs = peft.get_peft_model(tiny(architecture), form)
    with torch.no_grad():
        drawn = {
            key: torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))) / 4
            for key, value in ours.encoder.tensors().items()
        }
    ours.encoder.load_tensors(drawn)
    peft.set_peft_model_state_dict(theirs, drawn)
    ids = torch.stack([tokens(8, 1), tokens(8, 2)])
    labels = torch.where(torch.arange(8, device=DEVICE) > 3, ids, -100)
    losses = [model(input_ids=ids, labels=labels).loss for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    theirs_by_name = {name.removeprefix("base_model.model."): one.grad for name, one in theirs.named_parameters()}
    for name, parameter in ours.base_model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, theirs_by_name[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hydralora_with_one_b_is_lora(architecture):
    lora, hydra = attached("lora", tiny(architecture)), attached("hydralora", tiny(architecture), num_experts=1)
    parts = {}
    for key, value in hydra.encoder.tensors().items():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))) / 4)
        name, kind = key.rsplit(".", 1)
        if kind != "router":
            parts[f"base_model.model.{name}.lora_{kind}.weight"] = value[0] if kind == "B" else value
    lora.encoder.load_tensors(parts)
    assert_close(logits_of(hydra), logits_of(lora), atol=1e-6, rtol=0)
    for model in (lora, hydra):
        model(**TRAINING).loss.backward()
    gradients = {name: one.grad for name, one in lora.base_model.named_parameters() if one.requires_grad}
    for key, part in hydra.encoder.parts.items():
        name = key.replace("/", ".")
        assert_close(part.A.grad, gradients[f"{name}.lora_A.default.weight"], atol=1e-6, rtol=1e-4)
        assert_close(part.B.grad[0], gradients[f"{name}.lora_B.default.weight"], atol=1e-6, rtol=1e-4)
        assert not part.router.grad.any()


def drawn_hydralora(base=None):
    model = attached("hydralora", base)
    for key, value in model.encoder.tensors().items():
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))))
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hydralora_mixes_its_b_by_a_softmax_over_each_token(architecture):
    model = drawn_hydralora(tiny(architecture))
    key, part = next(iter(model.encoder.parts.items()))
    seen = {}
    module = model.base_model.get_submodule(key.replace("/", "."))
    module.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    model(tokens(6)[None])
    x, weight = seen["x"].double()[0], module.weight.double()
    weight = weight if architecture == "llama" else weight.T
    for token, given in zip(x, seen["y"][0].double(), strict=True):
        scores = [(row @ token).item() for row in part.router.double()]
        total = sum(2.718281828459045**score for score in scores)
        mixed = sum(
            2.718281828459045**score / total * (b.double() @ (part.A.double() @ token))
            for score, b in zip(scores, part.B, strict=True)
        )
        bias = 0 if module.bias is None else module.bias.double()
        assert_close(given, weight @ token + bias + 2.0 * mixed, atol=1e-4, rtol=1e-4)


def test_hydralora_routes_each_token_by_itself():
    part = next(iter(drawn_hydralora().encoder.parts.values()))
    x = torch.randn(2, 5, part.A.shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights = part.route(x)
    assert_close(weights.sum(-1), torch.ones(2, 5, device=DEVICE))
    assert len({tuple(row) for row in weights.flatten(0, 1).tolist()}) == 10
    changed = x.clone()
    changed[0, 2] += 1
    same = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    same[0, 2] = False
    assert torch.equal(part.route(changed)[same], weights[same])
    assert not torch.equal(part.route(changed)[0, 2], weights[0, 2])


def test_hydraloras_b_part_in_training_though_all_start_at_zero():
    start, (model, _) = attached("hydralora"), trained("hydralora", steps=6)
    for key, part in model.encoder.parts.items():
        before = start.encoder.parts[key]
        assert not before.B.any()
        assert not torch.equal(part.B[0], part.B[1])
        assert not torch.equal(part.router, before.router)


def test_a_fresh_adapter_leaves_the_logits_of_the_base():
    base = tiny_llama()(tokens(8)[None]).logits
    starts = ["ft", "lora", "hydralora", "dora", "eva", "riemannian", "lora-fa", "ffa-lora", "ia3"]
    for method in (*starts, "svfit", "soka", "sorsa", "bilora"):
        assert_close(attached(method)(tokens(8)[None]).logits, base, atol=1e-5, rtol=0)


def test_kasas_regularisers_are_in_the_training_loss_alone():
    model = attached("kasa")
    plain = model(**TRAINING).loss
    model.training = True
    model.encoders.train()
    added = model(**TRAINING).loss - plain
    assert_close(added, model.encoder.peft_model.base_model._get_kasa_loss(), atol=1e-6, rtol=1e-4)
    assert added > 0


def test_alpha_is_twice_the_rank_where_none_is_given():
    for rank in (1, 4):
        assert attached("lora", rank=rank).encoder.peft_config()["lora_alpha"] == 2 * rank
    assert attached("lora", alpha=8).encoder.peft_config()["lora_alpha"] == 8


# -- one adapter that changes the base ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [method for method in SIZES if method != "ft"])
def test_disable_adapter_gives_the_untouched_base_and_ends(method):
    model, _ = trained(method)
    trains = [parameter.requires_grad for parameter in model.parameters()]
    before = logits_of(model)
    ids = tokens(8)[None]
    with model.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
        assert model.num_virtual_tokens == 0
    assert torch.equal(logits_of(model), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_full_fine_tuning_cannot_be_taken_back():
    model, _ = trained("ft")
    with pytest.raises(ptmoe.PtmoeError, match="cannot be switched off: load the base again"), model.disable_adapter():
        pass
    with pytest.raises(ptmoe.PtmoeError, match="cannot be deleted"):
        model.delete_adapter("default")
    with pytest.raises(ptmoe.PtmoeError, match="holds a ft adapter"):
        attach(model.base_model, PTConfig())


@weight_side
def test_a_model_holds_one_such_adapter_and_no_other(method, tmp_path):
    model = attached(method)
    for config in (PTConfig(), METHODS["lora"](), METHODS["hydralora"]()):
        with pytest.raises(ptmoe.PtmoeError, match="changes the base's layers, so a model holds one"):
            attach(model, config, adapter_name="other")
        with pytest.raises(ptmoe.PtmoeError, match=f"holds a {method} adapter"):
            attach(model.base_model, config)
    prompted = attach(tiny_llama(), PTConfig(num_virtual_tokens=4))
    with pytest.raises(ptmoe.PtmoeError, match=f"{method} changes the base's layers, so a model holds one"):
        attach(prompted, METHODS[method](**SIZES[method]), adapter_name="other", batches=[TRAINING])
    model.save_pretrained(tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="changes the base's layers"):
        load_adapter(prompted, tmp_path, name="other")


@pytest.mark.parametrize("method", ["lora", "hydralora", "ft"])
def test_a_batch_does_not_mix_it_with_the_base(method):
    model, _ = trained(method)
    ids = torch.stack([tokens(5, 1), tokens(5, 2)])
    assert torch.equal(model(ids, adapter_names=["default"] * 2).logits, model(ids).logits)
    for call in (model, model.generate):
        with pytest.raises(ptmoe.PtmoeError, match="mixed batches are for prompts"):
            call(ids, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("method", [method for method in WEIGHTS if method != "ft"])
@pytest.mark.ci
def test_a_base_is_free_for_another_after_the_adapter_is_deleted(method):
    model, _ = trained(method)
    model.delete_adapter("default")
    ids = tokens(8)[None]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert torch.equal(logits_of(attach(model.base_model, PTConfig())), logits_of(attach(tiny_llama(), PTConfig())))


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "hydralora", "dora", "vera", "ia3"])
def test_a_base_without_the_modules_is_refused_with_the_names_of_its_own(method):
    base = tiny("gpt2")
    config = METHODS[method](**SIZES[method], target_modules=["q_proj"])
    with pytest.raises(ptmoe.PtmoeError, match=r"GPT2LMHeadModel, which has no linear module 'q_proj'.*c_attn, c_proj"):
        attach(base, config)
    with pytest.raises(ptmoe.PtmoeError, match="no linear module 'q_proj'"):
        count_parameters(base.config, config)


@pytest.mark.parametrize(("architecture", "modules"), [("gpt2", ["c_attn"]), ("gpt_neox", ["query_key_value"])])
def test_where_there_is_no_q_proj_the_usual_modules_of_the_architecture_are_taken(architecture, modules):
    for method in ("lora", "hydralora"):
        assert attached(method, tiny(architecture)).method_config.target_modules == modules


def test_what_peft_refuses_is_said_and_leaves_the_base_as_it_was():
    base = tiny("gpt2")
    with pytest.raises(ptmoe.PtmoeError, match="peft refuses kasa on GPT2LMHeadModel: KaSA does not support"):
        attach(base, METHODS["kasa"](rank=2))
    base = tiny_llama()
    with pytest.raises(
        ptmoe.PtmoeError, match="feedforward_modules names q_proj, and target_modules down_proj, k_proj"
    ):
        attach(base, METHODS["ia3"](feedforward_modules=["q_proj", "down_proj"]))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ptmoe.PtmoeError, match="peft refuses kasa"):  # the first module has room for it, the second not
        attach(base, METHODS["kasa"](rank=16))
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    attach(base, METHODS["lora"]())


STAGES = {  # of attaching a method: a function that is called for each module
    "lora": "peft.tuners.lora.layer.LoraLayer.update_layer",
    "pissa": "torch.linalg.svd",
    "eva": "peft.tuners.lora.eva.IncrementalPCA.partial_fit",
    "corda": "torch.linalg.svd",
    "peft:hira": "peft.tuners.hira.layer.HiraLayer.update_layer",
    "hydralora": "torch.rand",
    "bilora": "torch.linalg.qr",
    "nora": "torch.linalg.svd",
    "soka": "torch.linalg.svd",
}


def attributes(base):
    """Of all its modules, by name, without the decompositions that are kept."""
    return {name: vars(module).keys() - {"_leading"} for name, module in base.named_modules()}


@pytest.mark.parametrize("method", STAGES)
def test_attaching_that_is_interrupted_leaves_the_base_as_it_was(method, monkeypatch):
    base, ids, own = tiny_llama(), TRAINING["input_ids"][:1], pkgutil.resolve_name(STAGES[method])
    before, logits, calls = attributes(base), base(ids).logits, []

    def second_time_interrupted(*arguments, **options):
        calls.append(method)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    config = method_named(method)(**SIZES.get(method, {}) | ({"energy": 0.9} if method == "soka" else {}))
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[method], second_time_interrupted)
        with pytest.raises(KeyboardInterrupt):
            attach(base, config, batches=[TRAINING])
    assert torch.equal(base(ids).logits, logits)
    assert attributes(base) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    attach(base, METHODS["lora"]())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="such an id ends all that the process computes on the GPU")
@pytest.mark.parametrize("method", ["corda", "eva"])
def test_data_that_the_base_cannot_read_leaves_the_base_as_it_was(method):
    """Ids beyond the vocabulary, in the second batch."""
    base, ids = tiny_llama(), TRAINING["input_ids"]
    before = attributes(base)
    with pytest.raises(ptmoe.PtmoeError, match=f"peft refuses {method}: .*index"):
        attach(base, METHODS[method](), batches=[TRAINING, TRAINING | {"input_ids": torch.full_like(ids, 5000)}])
    assert not any(module._forward_hooks for module in base.modules())
    assert attributes(base) == before
    tensors = [attached(method, one).encoder.tensors() for one in (base, tiny_llama())]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "rank=0"),
        ("lora", {"alpha": 0}, "alpha=0"),
        ("lora", {"r": 4}, "unknown key 'r'"),
        ("lora", {"num_virtual_tokens": 4}, "unknown key 'num_virtual_tokens'"),
        ("hydralora", {"num_experts": 0}, "num_experts=0"),
        ("hydralora", {"num_expert": 2}, "did you mean 'num_experts'"),
        ("vera", {"projection_prng_key": -1}, "projection_prng_key=-1"),
        ("prefix-tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ("p-tuning", {"init": "text"}, "unknown key 'init'"),
        ("ft", {"rank": 4}, "unknown key 'rank'"),
        ("goat", {"rho": 0}, "rho=0"),
        ("goat", {"eta": float("inf")}, "eta=inf"),
        ("bilora", {"gamma": -1}, "gamma=-1"),
        ("sorsa", {"gamma": float("nan")}, "gamma=nan"),
        ("soka", {"energy": 0}, "energy=0"),
        ("soka", {"energy": 0.9, "rank": 2, "ranks": [1, 3]}, r"ranks=\[1, 3\]: needs energy.* none above rank=2"),
        ("soka", {"rank": 2, "ranks": [1, 2]}, r"ranks=\[1, 2\]: needs energy"),
    ],
)
def test_a_setting_that_cannot_be_is_named(method, settings, message):
    with pytest.raises(ptmoe.PtmoeError, match=message):
        METHODS[method](**settings)


# -- prompts of peft ---------------------------------------------------------------------------------------------------


def by_hand(model, ids):
    """The logits `(n, V)` of one unpadded row, straight from what peft's modules give."""
    base, encoder = model.base_model, model.encoder
    embeds = base.get_input_embeddings()(ids)
    if model.method_config.method == "prefix-tuning":
        from transformers import DynamicCache

        layers, heads = base.config.num_hidden_layers, encoder.resolved_config.num_attention_heads
        cache = DynamicCache()
        for index in range(layers):
            keys, values = (
                encoder.prefix.embedding.weight.view(4, 2 * layers, heads, -1)[:, 2 * index + i].transpose(0, 1)[None]
                for i in (0, 1)
            )
            cache.update(keys, values, index)
        return base(
            inputs_embeds=embeds[None],
            past_key_values=cache,
            position_ids=4 + torch.arange(len(ids), device=DEVICE)[None],
        ).logits[0]
    if model.method_config.method == "p-tuning":
        network = encoder.network
        prompt = network.mlp_head(network.embedding.weight)
    else:
        own = encoder.prompts
        prompt = own.embedding.weight * (own.prefix_task_cols[0] @ own.prefix_task_rows[0])
    spliced = torch.cat([prompt, embeds])[None]
    return base(inputs_embeds=spliced, position_ids=torch.arange(spliced.shape[1], device=DEVICE)[None]).logits[0, 4:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["p-tuning", "prefix-tuning", "multitask-prompt-tuning"])
def test_the_logits_are_those_of_pefts_modules_by_hand(method, architecture):
    model, _ = trained(method, tiny(architecture), steps=1)
    for row in ROWS:
        assert_close(model(row[None]).logits[0], by_hand(model, row), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["prefix-tuning", "mept"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beams_and_samples_find_the_prefix_in_the_cache(method, architecture):
    model, _ = trained(method, tiny(architecture), steps=2)
    if method == "mept":
        sharpened(model)
    ids, mask = batch(ROWS, LEFTS, 10)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(ids, mask, **options)
    assert together.shape == (6, 14)
    for i, row in enumerate(ROWS):
        assert torch.equal(together[2 * i : 2 * i + 2, -4:], model.generate(row[None], **options)[:, -4:])


def sharpened(model):
    """With routers that send different inputs to different experts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.encoder.router.copy_(2 * torch.randn(model.encoder.router.shape, generator=generator))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mept_puts_each_inputs_own_experts_before_it_in_every_layer(architecture):
    """In float64, with the cache of each row filled by hand."""
    from transformers import DynamicCache

    base = tiny(architecture)
    model = sharpened(attached("mept", base))
    experts, router = (array(value) for value in model.encoder.tensors().values())
    ids, mask = batch(ROWS, LEFTS, 10)
    logits, prefixes, chosen = model(ids, mask).logits, model.compose(ids, mask)[1].cache, set()
    for row, left, found, prefix in zip(ROWS, LEFTS, logits, prefixes.unbind(2), strict=True):
        assert torch.equal(prefix, model.compose(row[None])[1].cache[:, :, 0]), "no batch changes a choice"
        embeds = base.get_input_embeddings()(row)
        mean = array(embeds).mean(0)
        normal, cache = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5), DynamicCache()
        for layer, (weights, of_layer) in enumerate(zip(router, experts, strict=True)):
            p = np.exp(weights @ normal) / np.exp(weights @ normal).sum()
            chosen.add((layer, int(p.argmax())))
            keys, values = torch.from_numpy(p.max() * of_layer[p.argmax()]).to(embeds)
            cache.update(keys[None], values[None], layer)
        positions = 4 + torch.arange(len(row), device=DEVICE)[None]
        alone = base(inputs_embeds=embeds[None], past_key_values=cache, position_ids=positions).logits[0]
        assert_close(found[left : left + len(row)], alone, atol=1e-5, rtol=0)
    assert len(chosen) > len(router), "the rows go to different experts"


@pytest.mark.parametrize(("method", "architecture"), [("mept", "llama"), ("mept", "gpt2")])
def test_rows_that_find_prefixes_of_their_own_are_decoded_and_scored_as_alone(method, architecture):
    model = sharpened(attached(method, tiny(architecture))).eval()
    rows, never = [row.tolist() for row in ROWS], {"max_new_tokens": 5, "ended": lambda _: False}
    together = Decoder(model)(rows, [0, 0, 0], **never)
    assert together == [Decoder(model)([row], [0], **never)[0] for row in rows]
    for row, new in zip(ROWS, together, strict=True):
        assert model.generate(row[None], max_new_tokens=5, do_sample=False)[0, len(row) :].tolist() == new
    labels = [{"a": [5, 6], "b": [7]}] * 3
    for ours, row in zip(likelihoods(model, rows, labels, 3), rows, strict=True):
        assert ours == pytest.approx(likelihoods(model, [row], labels[:1], 1)[0], abs=1e-4)


@pytest.mark.parametrize("method", ["mept", "id-spam"])
def test_training_on_text_of_which_nothing_says_what_is_the_input_is_refused(method):
    sizes = {"num_virtual_tokens": 2}
    model = attach(tiny_llama(), METHODS[method](**sizes)).train()
    ids, mask = TRAINING["input_ids"], TRAINING["attention_mask"]
    with pytest.raises(ptmoe.PtmoeError, match="neither labels nor input_mask"):
        model(ids, mask)
    model(ids, mask, input_mask=mask)
    with torch.no_grad():
        model(ids, mask)
    attach(model, METHODS[method](**sizes), adapter_name="other")
    with pytest.raises(ptmoe.PtmoeError, match=r"neither labels nor input_mask|cannot be mixed"):
        model(ids, mask, adapter_names=["other", *["__base__"] * (len(ids) - 1)])


def test_the_prefix_takes_positions():
    model, _ = trained("prefix-tuning", tiny("gpt2"), steps=1)
    longest = tokens(POSITIONS - 4)
    ids, mask = batch([longest, tokens(3)], [9, 0], POSITIONS + 11)
    assert model(ids, mask).logits.isfinite().all()
    with pytest.raises(ptmoe.PtmoeError, match=f"{POSITIONS - 3} tokens with 4 virtual tokens exceeds"):
        model(tokens(POSITIONS - 3)[None])
    with pytest.raises(ptmoe.PtmoeError, match="3 new ones exceeds"):
        model.generate(tokens(POSITIONS - 6)[None], max_new_tokens=3)
    for options in ({"max_new_tokens": 3}, {}):
        assert model.generate(tokens(POSITIONS - 7)[None], **options).shape[1] == POSITIONS - 4


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_base_that_looks_at_a_window_of_positions_is_refused_a_prefix(architecture):
    with pytest.raises(
        ptmoe.PtmoeError, match=r"prefix-tuning does not fit (Mistral|Gemma2)ForCausalLM.*SlidingWindow"
    ):
        attach(tiny(architecture), METHODS["prefix-tuning"]())
    with pytest.raises(ptmoe.PtmoeError, match=r"mept does not fit (Mistral|Gemma2)ForCausalLM.*SlidingWindow"):
        attach(tiny(architecture), METHODS["mept"]())


@pytest.mark.filterwarnings("error:Converting a tensor:UserWarning")
@pytest.mark.parametrize("method", ["prefix-tuning", "mept"])
def test_what_would_lose_the_prefix_is_refused(method):
    model = attached(method)
    attach(model, PTConfig(num_virtual_tokens=2), adapter_name="pt")
    ids = torch.stack([tokens(5, 1), tokens(5, 2)])
    with pytest.raises(ptmoe.PtmoeError, match=rf"\({method}\) .* cannot be mixed in a batch"):
        model(ids, adapter_names=["default", "pt"])
    model.set_adapter("default")
    for option in ({"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ptmoe.PtmoeError, match="the prompt stands in: leave it out"):
            model.generate(ids, max_new_tokens=2, **option)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ptmoe.PtmoeError, match="gradient checkpointing drops the cache"):
        model(**TRAINING)
