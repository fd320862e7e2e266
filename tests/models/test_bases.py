"""A base's folder that is not whole, or not a model's, is refused in words."""

import json
import re
import shutil

import pytest
import torch

from ptmoe import nano
from ptmoe.errors import PtmoeError
from ptmoe.models.bases import load_base, load_tokenizer


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def configured(**changes):
    def change(folder):
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | changes))

    return change


WEIGHTS = "model.safetensors"
DAMAGES = {
    "weights cut short": (cut(WEIGHTS, 10_000), "file not fully covered"),
    "weights cut to nothing": (cut(WEIGHTS, 0), "header too small"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "a config of another size": (configured(hidden_size=120), "mismatched_sizes"),
    "a config of another type": (configured(hidden_size="wide"), "expected int, got str"),
    "a config that contradicts itself": (configured(num_attention_heads=7), "not a multiple of"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not list"),
    "a config of another architecture": (configured(model_type="zzz"), "does not recognize this architecture"),
    "an unknown dtype": (configured(dtype="float99"), "no attribute 'float99'"),
    "a quantization without its library": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        "requires optimum",
    ),
    "a tokenizer cut short": (cut("tokenizer.json", 3000), "Expecting property name"),
    "a tokenizer's config that is a list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "no attribute 'get'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(damage, tmp_path):
    damaged, reason = DAMAGES[damage]
    folder = tmp_path / "base"
    shutil.copytree(nano.FOLDER, folder)
    damaged(folder)
    with pytest.raises(PtmoeError, match=f"^'{re.escape(str(folder))}' holds no model .* \\(.*{reason}"):
        load_base(str(folder))
    if "tokenizer" in damage:
        with pytest.raises(PtmoeError, match=f"^'{re.escape(str(folder))}' holds no model .* \\(.*{reason}"):
            load_tokenizer(str(folder))


@pytest.mark.parametrize("config", [{"num_hidden_layers": 5}, {"tie_word_embeddings": False}])
def test_weights_that_are_not_there_are_not_made_up(config, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(nano.FOLDER, folder)
    configured(**config)(folder)
    with pytest.raises(
        PtmoeError, match=r"base' lacks weights of a LlamaForCausalLM, which would be random: .* in all"
    ):
        load_base(str(folder))


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
def test_a_folder_without_a_tokenizer_is_told_from_one_without_a_model(load, tmp_path):
    shutil.copytree(nano.FOLDER, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(PtmoeError, match=r"base' has no tokenizer: put it there with tokenizer\.save_pretrained$"):
        load(str(tmp_path / "base"))


def test_a_fault_is_said_once(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(nano.FOLDER, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(PtmoeError) as refused:
        load_tokenizer(str(folder))
    assert str(refused.value).count("holds no model") == 1


def test_a_dtype_of_torch_is_answered_with_its_name():
    with pytest.raises(PtmoeError, match=r"unknown dtype torch\.bfloat16; did you mean 'bfloat16'"):
        load_base("nano", dtype=torch.bfloat16)
