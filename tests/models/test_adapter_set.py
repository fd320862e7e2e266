"""Prompts from an embedding matrix alone, the same as behind a base model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import ptmoe
from ptmoe.methods import METHODS
from ptmoe.models.adapter_set import BASE, AdapterSet
from ptmoe.models.attach import attach
from testing.architectures import HIDDEN, VOCABULARY
from testing.bases import CONFIGS, batch, prompted, tiny, tokens

IDS, MASK = batch([tokens(5, 1), tokens(3, 2), tokens(8, 3), tokens(1, 4)], [0, 2, 0, 4])


@pytest.fixture
def folders(base, tmp_path):
    """An adapter folder of each prompt method, and the model that saved the last one."""
    for index, (name, config) in enumerate(CONFIGS.items()):
        model = prompted(base, config, seed=index)
        model.save_pretrained(tmp_path / name)
    return tmp_path


def test_prompts_from_the_embedding_are_those_of_the_model(base, folders):
    model = ptmoe.load_adapter(base, folders / "PT", name="PT")
    adapters = AdapterSet(base.get_input_embeddings())
    for name in CONFIGS:
        adapters.load(folders / name, name)
        if name != "PT":
            ptmoe.load_adapter(model, folders / name, name=name)
    names = list(CONFIGS)
    for first in range(len(names)):
        mixed = [names[first], names[(first + 1) % len(names)], BASE, names[first]]
        expected, _ = model.compose(IDS, MASK, adapter_names=mixed)
        spliced, prompts = adapters.compose(IDS, MASK, adapter_names=mixed)
        assert torch.equal(spliced.embeds, expected.embeds)
        assert torch.equal(spliced.attention_mask, expected.attention_mask)
        assert torch.equal(spliced.position_ids, expected.position_ids)
        assert prompts.lengths[2] == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_matrix_in_another_dtype_is_enough_and_prompts_are_composed_in_float32(config, tmp_path):
    base = tiny("llama")
    prompted(base, config).save_pretrained(tmp_path)
    matrix = base.get_input_embeddings().weight.detach().to(torch.bfloat16)
    composed = []
    for weight in (matrix, matrix.float()):
        adapters = AdapterSet(nn.Embedding.from_pretrained(weight))
        adapters.load(tmp_path, "a")
        spliced, prompts = adapters.compose(IDS, MASK, adapter_names=["a", "a", BASE, "a"])
        assert spliced.embeds.dtype == weight.dtype
        composed.append(prompts.embeds)
    assert_close(*composed, atol=0, rtol=0)


@pytest.mark.parametrize("config", [*CONFIGS.values(), METHODS["lora"]()], ids=[*CONFIGS, "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("wrong", [-100, VOCABULARY])
@pytest.mark.ci
def test_a_token_without_an_embedding_is_refused_in_words_wherever_it_stands(wrong, kind, config):
    """A CPU would name no id, and a GPU end all that the process computes on it; in padding, too."""
    model = attach(tiny(kind), config)
    ids, mask = batch([tokens(5), tokens(3)], [0, 2])
    assert model(ids, mask).logits.isfinite().all()
    for place in ((0, 4), (1, 0), (1, 4)):
        changed = ids.clone()
        changed[place] = wrong
        with pytest.raises(ptmoe.PtmoeError, match=rf"token {wrong} has no embedding, .* has {VOCABULARY}:"):
            model(changed, mask)
        with pytest.raises(ptmoe.PtmoeError, match=rf"token {wrong} has no embedding"):
            model.generate(changed, attention_mask=mask, max_new_tokens=2)
    if not ids.is_cuda:  # while a GPU trains nobody waits for it
        with pytest.raises(ptmoe.PtmoeError, match=rf"token {wrong} has no embedding"):
            model.train()(changed, mask, labels=ids)


def test_an_embedding_that_grows_is_used_and_one_that_is_replaced_is_refused(base):
    model = attach(base, CONFIGS["PT"])
    logits = model(IDS, MASK).logits
    base.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    assert_close(model(IDS, MASK).logits[..., :VOCABULARY], logits)
    assert model(IDS[:1] * 0 + VOCABULARY + 2).logits.isfinite().all()
    base.set_input_embeddings(copy.deepcopy(base.get_input_embeddings()))
    for call in (model, model.compose, model.generate):
        with pytest.raises(ptmoe.PtmoeError, match="input embedding was replaced after adapters were attached"):
            call(IDS, MASK)


def test_adapters_of_two_methods_with_the_same_options_keep_their_methods():
    adapters = AdapterSet(tiny("llama").get_input_embeddings())
    configs = {name: METHODS[name](num_virtual_tokens=4, rank=2) for name in ("dpt", "multitask-prompt-tuning")}
    assert len({config.model_dump_json() for config in configs.values()}) == 1, "options tell them apart: tells nothing"
    for name, config in configs.items():
        adapters.add(name, config.build(HIDDEN))
    assert [adapters[name].config.method for name in configs] == list(configs)


def test_an_adapter_of_another_base_or_one_that_needs_layers_is_refused(tmp_path):
    base = tiny("llama")
    adapters = AdapterSet(base.get_input_embeddings())
    prompted(tiny("llama", seed=5), CONFIGS["PT"]).save_pretrained(tmp_path / "other")
    with pytest.raises(ptmoe.PtmoeError, match="trained on another base"):
        adapters.load(tmp_path / "other", "a")
    ptmoe.attach(tiny("llama"), ptmoe.METHODS["lora"]()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ptmoe.PtmoeError, match=r"lora adapter, which needs its base model's layers"):
        adapters.load(tmp_path / "lora", "a")
    assert not len(adapters.encoders)
    with pytest.raises(ptmoe.PtmoeError, match="no adapter 'a'"):
        adapters.compose(IDS, MASK, adapter_names=["a"] * 4)
