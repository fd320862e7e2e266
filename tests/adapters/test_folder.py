"""The adapter folder: what is written is what is read, and what is damaged or foreign is refused by name."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import ptmoe
from ptmoe.adapters.folder import read_adapter
from ptmoe.adapters.peft import from_peft, to_peft
from ptmoe.methods import METHODS
from testing.architectures import ARCHITECTURES
from testing.bases import DEVICE, on_device, tiny, tiny_llama

SIZES = {  # those of the methods whose folders are ours; the others are in test_weights.py
    "pt-moe": {"num_virtual_tokens": 6, "rank": 4, "num_experts": 3},
    "pt": {"num_virtual_tokens": 6},
    "dpt": {"num_virtual_tokens": 6, "rank": 4},
    "smop": {"num_virtual_tokens": 3, "num_experts": 2},
    "attempt": {"num_virtual_tokens": 4, "num_sources": 3},
    "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "multitask-prompt-tuning": {"num_virtual_tokens": 4, "rank": 2},
    "ulpt": {"num_virtual_tokens": 4, "rank": 6},
    "id-spam": {"num_virtual_tokens": 4},
    "ept": {"num_virtual_tokens": 4, "num_decomposed_tokens": 6, "rank": 3},
    "fwd-prompt": {"num_virtual_tokens": 4},
}
KEYS = {
    "pt-moe": {"A", "B", "router.weight", "router.bias"},
    "pt": {"prompt"},
    "dpt": {"A", "B"},
    "smop": {"prompts", "router.weight"},
    "attempt": {"prompt", "down", "up", "source_prompts"},
    "p-tuning": {"network.embedding.weight"}
    | {f"network.mlp_head.{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")},
    "multitask-prompt-tuning": {
        "prompts.embedding.weight",
        "prompts.prefix_task_cols",
        "prompts.prefix_task_rows",
    },
    "ulpt": {"Z", "scale", "shift"},
    "id-spam": {"query", "key", "value", "down", "down_bias", "up", "prompt"},
    "ept": {"prompt", "A", "B", "gate", "down", "up"},
    "fwd-prompt": {"prompt"},
}


def attached(method="pt-moe", seed=1):
    return ptmoe.attach(tiny_llama(), METHODS[method](**SIZES[method]), seed=seed)


@pytest.fixture
def folder(tmp_path):
    attached().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def inputs():
    ids = torch.randint(3, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    return on_device({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", SIZES)
def test_a_saved_and_reloaded_adapter_gives_bit_identical_logits(method, architecture, tmp_path, inputs):
    model = ptmoe.attach(tiny(architecture), METHODS[method](**SIZES[method]), seed=1)
    model.save_pretrained(tmp_path)
    again = ptmoe.load_adapter(tiny(architecture), tmp_path)
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)


@pytest.mark.parametrize("method", SIZES)
def test_the_folder_holds_the_documented_keys_and_two_files(method, tmp_path):
    attached(method).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == KEYS[method]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper().replace("-", "_")
    assert config["hidden_size"] == tiny_llama().config.hidden_size


def test_an_adapter_takes_the_place_of_one_of_another_kind(tmp_path, inputs):
    for config in (METHODS["lora"](rank=2), METHODS["pt"](num_virtual_tokens=3), METHODS["lora"](rank=1)):
        model = ptmoe.attach(tiny_llama(), config, seed=1)
        model.save_pretrained(tmp_path)
        assert torch.equal(ptmoe.load_adapter(tiny_llama(), tmp_path)(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "name", ["a--b/c", "a..b/c", "a/b.git", "a-/b", "a/-b", "a/b.", "é/b", "a/b/c", "a b/c", "nothing"]
)
def test_what_can_be_neither_a_folder_nor_a_repository_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="no adapter folder"):
        ptmoe.load_adapter(tiny_llama(), name)


def test_several_adapters_stand_on_one_base(tmp_path, inputs):
    for name, seed in (("a", 1), ("b", 2)):
        attached("pt-moe", seed).save_pretrained(tmp_path / name)
    alone = {name: ptmoe.load_adapter(tiny_llama(), tmp_path / name)(**inputs).logits for name in "ab"}
    model = ptmoe.load_adapter(tiny_llama(), tmp_path / "a", name="a")
    model = ptmoe.load_adapter(model, tmp_path / "b", name="b")
    for name in "ab":
        model.set_adapter(name)
        assert torch.equal(model(**inputs).logits, alone[name])
    assert not torch.equal(alone["a"], alone["b"])


def test_a_run_folder_stands_for_the_adapter_in_it(folder, inputs):
    assert torch.equal(
        ptmoe.load_adapter(tiny_llama(), folder.parent)(**inputs).logits,
        ptmoe.load_adapter(tiny_llama(), folder)(**inputs).logits,
    )


def test_the_same_base_in_bfloat16_is_recognised(folder):
    assert ptmoe.load_adapter(tiny_llama().to(torch.bfloat16), folder).encoder.A.dtype == torch.float32


def test_a_base_of_another_hidden_size_is_refused(folder):
    with pytest.raises(ptmoe.PtmoeError, match="hidden size 32, this one has 48"):
        ptmoe.load_adapter(tiny_llama(hidden_size=48), folder)


def test_a_base_with_another_embedding_is_refused(folder):
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        ptmoe.load_adapter(tiny_llama(seed=5), folder)


def rewrite_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def rewrite_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def nan(tensors):
    tensors["B"][0, 0] = float("nan")


DAMAGE = {
    "a missing tensor": (
        lambda f: rewrite_tensors(f, lambda t: t.pop("router.bias")),
        r"lacks the tensor router\.bias",
    ),
    "an unknown tensor": (
        lambda f: rewrite_tensors(f, lambda t: t.update({"router.wieght": t["B"].clone()})),
        r"unknown tensor 'router.wieght'; did you mean 'router.weight'",
    ),
    "a NaN": (lambda f: rewrite_tensors(f, nan), "B holds NaN"),
    "another shape": (lambda f: rewrite_config(f, rank=3), r"A has shape \(3, 6, 4\), its config says \(3, 6, 3\)"),
    "an unknown key": (
        lambda f: rewrite_config(f, num_expert=3),
        "unknown key 'num_expert'; did you mean 'num_experts'",
    ),
    "an unknown type": (lambda f: rewrite_config(f, peft_type="PT_MEO"), "peft_type='PT_MEO'; did you mean 'PT_MOE'"),
    "a hidden size that is none": (lambda f: rewrite_config(f, hidden_size="32"), "hidden_size='32'"),
    "a truncated file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-40]),
        "adapter_model.safetensors is damaged",
    ),
    "a config that is not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "a pickle beside it": (lambda f: (f / "adapter_model.bin").write_bytes(pickle.dumps({})), "pickles can run code"),
}


def test_what_a_trainer_leaves_beside_an_adapter_is_not_read(folder):
    (folder / "training_args.bin").write_bytes(pickle.dumps({}))
    assert read_adapter(folder).tensors.keys() == ptmoe.load_adapter(tiny_llama(), folder).encoder.tensors().keys()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(damage, folder):
    spoil, message = DAMAGE[damage]
    spoil(folder)
    with pytest.raises(ptmoe.PtmoeError, match=message):
        read_adapter(folder)
    with pytest.raises(ptmoe.PtmoeError, match=message):
        ptmoe.load_adapter(tiny_llama(), folder)


def test_a_run_whose_training_was_stopped_is_told_from_a_damaged_folder(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ptmoe.PtmoeError, match=r"training has not ended: .*`ptmoe train --resume --output-dir .*`$"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pt_adapter_becomes_pefts_prompt_tuning_and_back(architecture, tmp_path, inputs):
    peft = pytest.importorskip("peft")
    ids = inputs["input_ids"]
    model = ptmoe.attach(tiny(architecture), ptmoe.PTConfig(**SIZES["pt"]), seed=1)
    model.save_pretrained(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "peft").eval()
    tokens = model.method_config.num_virtual_tokens
    expected = theirs(input_ids=ids).logits[:, tokens:]
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)

    theirs.save_pretrained(tmp_path / "saved by peft")
    from_peft(tmp_path / "saved by peft", tmp_path / "back", tiny(architecture))
    back = ptmoe.load_adapter(tiny(architecture), tmp_path / "back")
    torch.testing.assert_close(back(ids).logits, expected, atol=1e-5, rtol=0)


def test_only_pt_has_a_form_in_peft(folder, tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match="pt-moe adapter: peft has a form for pt only"):
        to_peft(folder, tmp_path / "peft")


def test_a_damaged_folder_of_pefts_is_refused_by_name(tmp_path):
    attached("pt").save_pretrained(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    rewrite_config(tmp_path / "peft", num_virtual_tokens=None)
    with pytest.raises(ptmoe.PtmoeError, match="num_virtual_tokens=None"):
        from_peft(tmp_path / "peft", tmp_path / "back", tiny_llama())
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    with pytest.raises(ptmoe.PtmoeError, match="is not JSON"):
        from_peft(tmp_path / "peft", tmp_path / "back", tiny_llama())
    assert not (tmp_path / "back").exists()


def test_pefts_folder_is_pointed_to_convert(tmp_path):
    attached("pt").save_pretrained(tmp_path / "ours")
    to_peft(tmp_path / "ours", tmp_path / "peft")
    with pytest.raises(ptmoe.PtmoeError, match="ptmoe convert"):
        ptmoe.load_adapter(tiny_llama(), tmp_path / "peft")


def test_attempt_takes_its_sources_from_pt_adapters(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        ptmoe.attach(tiny_llama(), ptmoe.PTConfig(num_virtual_tokens=4), seed=seed).save_pretrained(tmp_path / name)
    sources = [str(tmp_path / name) for name in "ab"]
    model = ptmoe.attach(tiny_llama(), ptmoe.ATTEMPTConfig(num_virtual_tokens=4, num_sources=2, source_prompts=sources))
    for index, source in enumerate(sources):
        assert torch.equal(model.encoder.source_prompts[index], read_adapter(source).tensors["prompt"].to(DEVICE))


def test_attempt_needs_a_folder_for_each_source():
    with pytest.raises(ptmoe.PtmoeError, match="names 1 folders for num_sources=2"):
        ptmoe.ATTEMPTConfig(source_prompts=["a"])
