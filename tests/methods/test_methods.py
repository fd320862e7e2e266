"""The methods: their sizes, their initial values, their noise, and the settings that they refuse."""

import importlib
import json
import math
from itertools import permutations
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

import ptmoe
from ptmoe import methods
from ptmoe.adapters.folder import read_adapter
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, DPTConfig, MethodConfig, PromptConfig, PTConfig, PTMoEConfig, shelf
from ptmoe.methods.factors import random_projection
from ptmoe.methods.routing import SPREAD, RoutedEncoder, Router, RoutingStatistics, gate
from ptmoe.models.attach import attach, count_parameters, load_adapter
from ptmoe.train.options import method_config
from testing.architectures import HIDDEN
from testing.bases import (
    CONFIGS,
    DEVICE,
    LLAMA_1B,
    SELECTIVE_PROBATIONARY,
    array,
    batch,
    own_projection,
    prompted,
    tiny_llama,
    tokens,
)

# -- sizes -------------------------------------------------------------------------------------------------------------

PAPER = {
    "ft": 1_235_814_400,
    "lora": 106_496,
    "hydralora": 278_528,
    "pt": 81_920,
    "dpt": 81_432,
    "smop": 86_016,
    "attempt": 90_112,
    "pt-moe": 80_706,
}


@pytest.mark.parametrize("method", PAPER)
def test_the_defaults_have_the_papers_number_of_parameters(method):
    assert count_parameters(LLAMA_1B, METHODS[method]()) == PAPER[method]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_count_is_that_of_the_model(config):
    model = attach(tiny_llama(), config)
    assert count_parameters(model.config, config) == model.num_parameters(only_trainable=True)


def test_counting_allocates_nothing():
    config = transformers.LlamaConfig(hidden_size=10**7)
    assert count_parameters(config, PTConfig(num_virtual_tokens=10**7)) == 10**14  # 400 TB if it did


@given(T=st.integers(1, 12), N=st.integers(1, 4), R=st.integers(1, 12))
def test_the_count_is_the_published_formula(T, N, R):
    sizes = {"num_virtual_tokens": T, "rank": min(R, T)}
    config, R = transformers.LlamaConfig(hidden_size=HIDDEN), min(R, T)
    assert count_parameters(config, PTMoEConfig(**sizes, num_experts=N)) == N * T * R + R * HIDDEN + N * (HIDDEN + 1)
    assert count_parameters(config, DPTConfig(**sizes)) == R * (T + HIDDEN)


# -- what the program asks of a method --------------------------------------------------------------------------------


def test_a_method_is_a_module_of_its_own_and_an_import():
    modules = {importlib.import_module(f"ptmoe.methods.{module.name}") for module in iter_modules(methods.__path__)}
    written = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MethodConfig) and "method" in vars(value)
    }
    assert {config for name, config in METHODS.items() if name not in shelf.SHORT} == written
    assert len({config.__module__ for config in written}) == len(written)
    assert {config.__name__ for config in written} < set(ptmoe.__all__)
    assert all(getattr(ptmoe, config.__name__) is config for config in written)


def test_no_two_methods_of_the_paper_look_alike():
    of_paper = [METHODS[name] for name in PAPER]
    for attribute in ("figure_marker", "order"):
        assert len({getattr(config, attribute) for config in of_paper}) == len(of_paper)
    for mode in (0, 1):
        assert len({config.figure_color[mode] for config in of_paper}) == len(of_paper)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_whether_a_method_routes_and_mixes_experts_is_what_its_prompts_do(config):
    routing = prompted(tiny_llama(), config).route(tokens(8)[None])
    assert (routing is not None) == config.routes
    if config.routes:
        assert ((routing.gate > 0).sum() > 1).item() == config.soft_gate


# -- options that were removed -----------------------------------------------------------------------------------------

BEFORE = {  # the fields of adapters and run configs as they were written then
    "pt": {"num_virtual_tokens": 4, "position": "before", "init": "vocabulary", "init_text": None},
    "smop": {
        "num_virtual_tokens": 4,
        "position": "before",
        "init": "vocabulary",
        "init_text": None,
        "num_experts": 2,
        "router_noise": 0.1,
    },
    "pt-moe": {
        "num_virtual_tokens": 4,
        "position": "before",
        "init": "vocabulary",
        "init_text": None,
        "num_experts": 2,
        "rank": 3,
        "selective": True,
        "probationary": True,
        "top_k": 1,
        "balance_loss": 0.0,
        "router_noise": 0.1,
        "router_init": "gradient",
        "router_standardize": True,
        "routing_anneal": True,
        "distinct_experts": True,
    },
    "attempt": {
        "num_virtual_tokens": 4,
        "position": "before",
        "init": "vocabulary",
        "init_text": None,
        "bottleneck": 2,
        "num_sources": 2,
        "source_prompts": [],
    },
    "p-tuning": {"num_virtual_tokens": 4, "position": "before", "encoder_hidden_size": 128},
}


def rewritten(folder, **fields):
    """The adapter's folder with these fields in its config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("method", BEFORE)
def test_adapters_and_run_configs_from_before_options_were_removed_load(method, tmp_path):
    config = METHODS[method](**BEFORE[method])
    assert not {"position", "top_k", "balance_loss"} & config.model_dump().keys()
    assert method_config({"name": method, **BEFORE[method]}) == config
    model = attach(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny_llama(), rewritten(tmp_path, **BEFORE[method]))
    assert again.method_config == config
    assert torch.equal(again(tokens(8)[None]).logits, model(tokens(8)[None]).logits)


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("pt", "position", "after"),
        ("smop", "position", "after"),
        ("pt-moe", "top_k", 2),
        ("pt-moe", "balance_loss", 0.5),
    ],
)
def test_a_removed_option_that_had_an_effect_is_refused_in_words(method, option, value, tmp_path):
    message = f"{option}={value!r}: the option {option} was removed.* needs the version of ptmoe that trained it"
    with pytest.raises(PtmoeError, match=message):
        METHODS[method](**{**BEFORE[method], option: value})
    attach(tiny_llama(), METHODS[method](**BEFORE[method])).save_pretrained(tmp_path)
    with pytest.raises(PtmoeError, match=message):
        load_adapter(tiny_llama(), rewritten(tmp_path, **(BEFORE[method] | {option: value})))


def test_a_removed_option_is_unknown_to_methods_that_never_had_it():
    with pytest.raises(PtmoeError, match="unknown key 'top_k'"):
        PTConfig(top_k=1)
    with pytest.raises(PtmoeError, match="unknown key 'position'"):
        METHODS["lora"](position="before")


# -- start values ------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer that looks words up by number: `"5 17 3"`."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


TEXTS = ["5 17 3 44 90 21 8", "33 12 70 71", "6 60 66 9 99 69 96 19 91 11 13 15 20"]
SIZES = {"num_virtual_tokens": 10, "rank": 4, "num_experts": 3}


def embedded(base, text, length):
    """The embeddings `(length, H)` of a text, repeated or cut, as the base reads them."""
    ids = Words()(text, add_special_tokens=False)["input_ids"]
    return array(base.get_input_embeddings()(torch.tensor((ids * length)[:length], device=DEVICE)))


def best_error(matrix, rank):
    """Eckart and Young: no product of that rank is nearer in the Frobenius norm."""
    return np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def products(encoder):
    return array(encoder.A @ encoder.B)


@pytest.mark.parametrize("text", TEXTS)
def test_one_text_starts_every_expert_at_its_best_low_rank_form(base, text):
    config = PTMoEConfig(**SIZES, init="text", init_text=text, recipe="paper", distinct_experts=True)
    encoder = attach(base, config, tokenizer=Words()).encoder
    expected = embedded(base, text, 10)
    for product in products(encoder):
        assert np.linalg.norm(product - expected) == pytest.approx(best_error(expected, 4), rel=1e-5, abs=1e-5)
    assert all(torch.equal(expert, encoder.A[0]) for expert in encoder.A)


def test_a_text_for_each_expert_starts_them_from_one_joint_decomposition(base):
    config = PTMoEConfig(**SIZES, init="text", init_text=TEXTS)
    encoder = attach(base, config, tokenizer=Words()).encoder
    expected = np.concatenate([embedded(base, text, 10) for text in TEXTS])
    error = np.linalg.norm(np.concatenate(list(products(encoder))) - expected)
    assert error == pytest.approx(best_error(expected, 4), rel=1e-5)
    assert not any(torch.equal(encoder.A[i], encoder.A[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


def test_dpt_starts_at_the_best_low_rank_form_of_its_text(base):
    config = DPTConfig(num_virtual_tokens=10, rank=4, init="text", init_text=TEXTS[2])
    expected = embedded(base, TEXTS[2], 10)
    error = np.linalg.norm(products(attach(base, config, tokenizer=Words()).encoder) - expected)
    assert error == pytest.approx(best_error(expected, 4), rel=1e-5)


def test_the_factors_share_the_singular_values_evenly(base):
    """`A_i = U_R Σ_R^½`, `B = Σ_R^½ V_Rᵀ`: both have the same, diagonal Gram matrix."""
    config = PTMoEConfig(**SIZES, init="text", init_text=TEXTS[2], recipe="paper")
    encoder = attach(base, config, tokenizer=Words()).encoder
    values = np.linalg.svd(embedded(base, TEXTS[2], 10), compute_uv=False)[:4]
    expected = torch.diag(torch.from_numpy(values)).to(encoder.A)
    assert_close(encoder.A[0].T @ encoder.A[0], expected, atol=1e-4, rtol=1e-4)
    assert_close(encoder.B @ encoder.B.T, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
def test_pt_and_every_prompt_of_smop_start_as_their_text_repeated_or_cut(base, text):
    options = {"num_virtual_tokens": 10, "init": "text", "init_text": text}
    prompt = attach(base, PTConfig(**options), tokenizer=Words()).encoder.prompt
    prompts = attach(base, METHODS["smop"](**options), tokenizer=Words()).encoder.prompts
    for found in (prompt, *prompts):
        assert_close(array(found), embedded(base, text, 10))


def test_a_prompt_from_the_vocabulary_is_made_of_what_the_base_reads(base):
    vocabulary = base.get_input_embeddings()(torch.arange(base.config.vocab_size, device=DEVICE))
    for prompts in (
        attach(base, PTConfig(num_virtual_tokens=10)).encoder.prompt,
        attach(base, METHODS["smop"](num_virtual_tokens=4)).encoder.prompts.flatten(0, 1),
        attach(base, METHODS["attempt"](num_virtual_tokens=4, init="random")).encoder.source_prompts.flatten(0, 1),
    ):
        assert (prompts[:, None] == vocabulary).all(-1).any(1).all()


@pytest.mark.parametrize("length", [1, 6, 11, 15, 40])
@pytest.mark.ci
def test_a_prompt_from_examples_is_the_end_of_them_one_after_another_without_their_padding(base, length):
    rows = [tokens(size, seed=size) for size in (3, 5, 7)]
    config = PTConfig(num_virtual_tokens=length, init="examples")

    def start(lefts, seed=3):
        ids, mask = batch(rows, lefts)
        data = [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}]
        return attach(base, config, seed=seed, batches=data).encoder.prompt

    prompt = start([0, 0, 0])
    assert torch.equal(start([4, 2, 0]), prompt)
    ends = [torch.cat(order * length)[-length:] for order in permutations(rows)]
    starts = [start([4, 1, 0], seed) for seed in range(20)]
    assert all(any(torch.equal(found, base.get_input_embeddings()(end)) for end in ends) for found in starts)
    assert any(not torch.equal(found, prompt) for found in starts)


def test_a_random_start_has_the_scale_of_the_embeddings(base):
    scale = base.get_input_embeddings()(torch.arange(base.config.vocab_size, device=DEVICE)).std()
    for config in (PTConfig(init="random"), PTMoEConfig(init="random", rank=30), DPTConfig(init="random", rank=30)):
        encoder = attach(base, config).encoder
        prompt = encoder.prompt if config.method == "pt" else encoder.A @ encoder.B
        assert prompt.std().item() == pytest.approx(scale.item(), rel=0.25)


def test_distinct_experts_and_prompts_of_smop_start_apart_and_experts_of_the_paper_alike():
    distinct = attach(tiny_llama(), PTMoEConfig(**SIZES, distinct_experts=True)).encoder.A
    assert not torch.equal(distinct[0], distinct[1])
    for fields in ({}, {"recipe": "paper"}):
        alike = attach(tiny_llama(), PTMoEConfig(**SIZES, **fields)).encoder.A
        assert torch.equal(alike[0], alike[1])
    prompts = attach(tiny_llama(), METHODS["smop"]()).encoder.prompts
    assert not torch.equal(prompts[0], prompts[1])


@pytest.mark.parametrize("config", [PTMoEConfig(rank=4, num_experts=8), METHODS["smop"](num_experts=8)])
def test_a_router_starts_as_a_linear_layer(config):
    weight = attach(tiny_llama(), config).encoder.router.weight
    limit = HIDDEN**-0.5
    assert weight.abs().max() <= limit
    assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize("init", ["vocabulary", "examples", "random"])
@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if issubclass(config, PromptConfig)])
def test_a_seed_decides_every_start_value_and_leaves_the_global_state_alone(method, init):
    sizes = {"rank": 20} if "rank" in METHODS[method].model_fields else {}
    config = METHODS[method](num_virtual_tokens=20, init=init, **sizes)
    data = [{"input_ids": tokens(30, seed).view(3, 10)} for seed in range(4)] if config.needs_batches else None
    before = torch.get_rng_state()
    first = attach(tiny_llama(), config, seed=7, batches=data).encoder.tensors()
    torch.randn(3)
    again = attach(tiny_llama(), config, seed=7, batches=data).encoder.tensors()
    other = attach(tiny_llama(), config, seed=8, batches=data).encoder.tensors()
    torch.set_rng_state(before)
    attach(tiny_llama(), config, seed=7, batches=data)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(again[key], value) for key, value in first.items())
    drawn = {key: value for key, value in first.items() if value.unique().numel() > 1}  # not all 0 or all 1
    assert drawn
    assert all(not torch.equal(other[key], value) for key, value in drawn.items())


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if not config.changes_layers])
def test_every_parameter_of_a_prompt_gets_a_gradient_at_every_step(method):
    """Distributed training waits for all of them (`ddp_find_unused_parameters`)."""
    sizes = {"rank": 20} if "rank" in METHODS[method].model_fields else {}
    model = attach(tiny_llama(), METHODS[method](num_virtual_tokens=20, **sizes)).train()
    ids = torch.stack([tokens(9), tokens(9, seed=1)])
    labels = ids.masked_fill(torch.arange(9, device=ids.device) < 5, -100)
    states = [{}]
    if isinstance(model.encoder, RoutedEncoder):
        model.encoder.has_callback = True
        states += [{"together": True}, {"hardness": 0.0}, {"alone": True}]
    for state in states:
        vars(model.encoder).update(state)
        model.zero_grad()
        model(ids, labels=labels).loss.backward()
        assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize(("rank", "hidden", "seed"), [(1, 32, 0), (7, 48, 3), (64, 2048, 2**32 - 1)])
def test_a_frozen_projection_is_what_its_seed_says_by_another_generator_and_the_formula(rank, hidden, seed):
    """To the bit, so that it need not be saved."""
    expected = torch.from_numpy(own_projection(rank, hidden, seed)).float()
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = random_projection(seed, rank, hidden)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rank", [3, HIDDEN])
@pytest.mark.parametrize("method", ["ulpt", "pt-moe"])
def test_a_prompt_behind_a_frozen_projection_starts_at_the_least_squares_of_its_embeddings(method, rank):
    fields = {"num_virtual_tokens": 10, "rank": rank, "init": "text", "init_text": TEXTS[2], "projection_seed": 5}
    if method == "pt-moe":
        fields |= {"frozen_projection": True, "num_experts": 3}
    base = tiny_llama()
    encoder = attach(base, METHODS[method](**fields), tokenizer=Words()).encoder
    wanted, projection = embedded(base, TEXTS[2], 10), own_projection(rank, HIDDEN, 5)
    rest = wanted - wanted.mean(0)
    best = np.linalg.lstsq(projection.T, rest.T, rcond=None)[0].T @ projection + wanted.mean(0)
    prompts = encoder.fixed_prompts() if method == "ulpt" else encoder.expert_prompts()
    assert len(prompts) == (1 if method == "ulpt" else 3)
    for prompt in prompts:
        assert_close(array(prompt), best, atol=1e-4, rtol=0)
    assert np.allclose(best, wanted) == (rank == HIDDEN)


def test_what_a_frozen_projection_leaves_to_train_is_counted_and_saved_without_it(tmp_path):
    """arXiv:2502.04501: T·R + 2·H numbers; at 100 tokens of T5-base in 2 dimensions, 2 % of prompt tuning's."""
    base = transformers.LlamaConfig(hidden_size=768)
    assert count_parameters(base, METHODS["ulpt"](num_virtual_tokens=100, rank=2)) == 100 * 2 + 2 * 768 == 1736
    assert count_parameters(base, PTConfig(num_virtual_tokens=100)) == 76_800
    frozen = PTMoEConfig(num_virtual_tokens=10, num_experts=3, rank=20, frozen_projection=True)
    assert count_parameters(base, frozen) == 3 * 10 * 20 + 2 * 768 + 3 * 769
    for config in (METHODS["ulpt"](num_virtual_tokens=6, rank=8), frozen):
        model = attach(tiny_llama(), config)
        model.save_pretrained(tmp_path / config.method)
        saved = load_file(tmp_path / config.method / "adapter_model.safetensors")
        assert sum(value.numel() for value in saved.values()) == model.num_parameters(only_trainable=True)
        again = load_adapter(tiny_llama(), tmp_path / config.method)
        assert torch.equal(again(tokens(8)[None]).logits, model(tokens(8)[None]).logits)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (METHODS["id-spam"](num_virtual_tokens=5, bottleneck=3, attention_size=4), 5 * 32 * 4 + 3 * 4 * 32 + 3 * 5),
        (
            METHODS["ept"](num_virtual_tokens=5, num_decomposed_tokens=9, rank=4, num_spaces=3, space_rank=2),
            5 * 32 + 4 * (9 + 32) + 3 * 32 * (1 + 2 * 2),
        ),
        (METHODS["fwd-prompt"](num_virtual_tokens=5), 5 * 32),
        (METHODS["mept"](num_virtual_tokens=5, num_experts=3), 2 * 3 * (2 * 5 * 2 * 8 + 32)),
    ],
)
def test_the_count_is_the_formula_of_the_config(config, count):
    assert count_parameters(tiny_llama().config, config) == count


def test_ept_starts_at_its_short_prompt_fused_with_the_best_low_rank_form_of_the_rest(base):
    fields = {"num_virtual_tokens": 4, "num_decomposed_tokens": 9, "rank": 3, "init": "text", "init_text": TEXTS[2]}
    encoder = attach(base, METHODS["ept"](**fields), tokenizer=Words()).encoder
    whole = embedded(base, TEXTS[2], 13)
    error = np.linalg.norm(products(encoder) - whole[4:])
    assert error == pytest.approx(best_error(whole[4:], 3), rel=1e-5)
    scores = whole[:4] @ products(encoder).T / np.sqrt(HIDDEN)
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert_close(array(encoder.fixed_prompts()[0]), whole[:4] + weights @ products(encoder), atol=1e-4, rtol=0)


# -- tasks in sequence -------------------------------------------------------------------------------------------------


def earlier_prompts(folder, base, *lengths):
    """Folders of `pt` and `fwd-prompt` adapters, in turn, with drawn prompts."""
    folders = []
    for index, length in enumerate(lengths):
        config = METHODS["pt" if index % 2 == 0 else "fwd-prompt"](num_virtual_tokens=length)
        prompted(base, config, seed=index + 2).save_pretrained(folder / str(index))
        folders.append(str(folder / str(index)))
    return folders


@pytest.mark.parametrize("energy", [0.5, 1.0])
def test_what_fwd_prompt_trains_is_orthogonal_to_the_earlier_prompts(energy, tmp_path):
    earlier = earlier_prompts(tmp_path, tiny_llama(), 6, 3, 4)
    config = METHODS["fwd-prompt"](num_virtual_tokens=4, earlier=earlier, energy=energy)
    model = attach(tiny_llama(), config)
    prompts = np.concatenate([array(read_adapter(folder).tensors["prompt"]) for folder in earlier])
    start = prompts[-4:]
    assert_close(array(model.encoder.fixed_prompts()[0]), start, atol=1e-6, rtol=0)

    values, right = np.linalg.svd(prompts)[1:]
    shares = np.cumsum(values**2) / np.sum(values**2)
    kept = next(count for count, share in enumerate(shares, 1) if share >= energy - 1e-12)
    assert kept == (13 if energy == 1 else kept) < HIDDEN
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.3)
    ids = torch.stack([tokens(8, 1), tokens(8, 2)])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "next")
    assert set(load_file(tmp_path / "next" / "adapter_model.safetensors")) == {"prompt"}
    loaded = load_adapter(tiny_llama(), tmp_path / "next")
    assert loaded(ids).logits is not None
    with pytest.raises(PtmoeError, match="a loaded fwd-prompt knows no directions of earlier prompts"):
        loaded.train()(ids, labels=ids)
    change = array(loaded.encoder.prompt) - start
    assert np.linalg.norm(change) > 0.1
    assert np.abs(change @ right[:kept].T).max() < 1e-5
    if energy < 1:
        assert np.abs(change @ right[kept:13].T).max() > 1e-3, "what is left of them may change"


def test_fwd_prompt_is_pt_without_earlier_tasks():
    first, second = (attach(tiny_llama(), METHODS[name](num_virtual_tokens=4)) for name in ("pt", "fwd-prompt"))
    assert torch.equal(first.encoder.prompt, second.encoder.prompt)
    assert torch.equal(first(tokens(5)[None]).logits, second(tokens(5)[None]).logits)


def test_earlier_prompts_that_cannot_be_started_from_are_refused(tmp_path):
    def attached(*earlier, **fields):
        return attach(tiny_llama(), METHODS["fwd-prompt"](num_virtual_tokens=4, earlier=list(earlier), **fields))

    (other,) = earlier_prompts(tmp_path / "other base", tiny_llama(seed=5), 4)
    with pytest.raises(PtmoeError, match="was trained on another base"):
        attached(other)
    with pytest.raises(PtmoeError, match="was trained on another base"):
        attach(tiny_llama(), METHODS["attempt"](num_virtual_tokens=4, num_sources=1, source_prompts=[other]))
    shorter, most = earlier_prompts(tmp_path / "long", tiny_llama(), 3, HIDDEN)
    with pytest.raises(PtmoeError, match=rf"of shape \(3, {HIDDEN}\), .* set num_virtual_tokens=3"):
        attached(shorter)
    (last,) = earlier_prompts(tmp_path / "last", tiny_llama(), 4)
    with pytest.raises(PtmoeError, match=f"take all {HIDDEN} dimensions .* lower energy"):
        attached(most, last, energy=1.0)
    assert attached(most, last, energy=0.5).encoder.basis.shape[0] < HIDDEN
    attach(tiny_llama(), METHODS["attempt"](num_virtual_tokens=4)).save_pretrained(tmp_path / "attempt")
    with pytest.raises(PtmoeError, match="needs a pt adapter, is a attempt adapter"):
        attached(str(tmp_path / "attempt"))
    with pytest.raises(PtmoeError, match="no adapter folder"):
        attached(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DPTConfig(num_virtual_tokens=4, rank=2), "needs a pt adapter, is a dpt adapter"),
        (PTConfig(num_virtual_tokens=5), rf"needs a pt adapter of shape \(4, {HIDDEN}\), has shape \(5, {HIDDEN}\)"),
    ],
)
def test_a_source_prompt_that_does_not_fit_is_named(source, message, tmp_path):
    attach(tiny_llama(), source).save_pretrained(tmp_path)
    config = METHODS["attempt"](num_virtual_tokens=4, num_sources=1, source_prompts=[str(tmp_path)])
    with pytest.raises(PtmoeError, match=f"source prompt {tmp_path}: {message}"):
        attach(tiny_llama(), config)


# -- the router --------------------------------------------------------------------------------------------------------


@given(logits=st.lists(st.floats(-5, 5), min_size=2, max_size=5, unique=True))
def test_the_four_gates_are_those_of_the_paper(logits):
    p = torch.tensor([logits]).softmax(1)
    best = p.argmax()
    for config in SELECTIVE_PROBATIONARY.values():
        g = gate(p, selective=config.selective, probationary=config.probationary)[0]
        assert ((g > 0).sum() == 1) == config.selective
        assert g[best] == (p[0, best] if config.probationary else 1)
        if not config.selective:
            assert_close(g, p[0] if config.probationary else torch.ones_like(g))


@pytest.mark.parametrize("name", ["PT-MoE selective probationary", "SMoP"])
def test_noise_moves_the_routing_in_training_only(name):
    model = prompted(tiny_llama(), CONFIGS[name])
    inputs = {"input_ids": tokens(8)[None], "input_mask": torch.ones(1, 8, dtype=torch.long, device=DEVICE)}

    def twice():
        return [model(**inputs).routing.probabilities for _ in range(2)]

    assert torch.equal(*twice())
    model.train()
    assert not torch.equal(*twice())


def test_noise_multiplies_the_logits():
    """`ℓ' = ℓ ⊙ (1 + ε)`: its spread is σ|ℓ|, so a logit of zero stays."""
    router = Router(4, 3).train()
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([0.0, 2.0, -4.0]))
        drawn = router(torch.zeros(20_000, 4), noise=0.1)
    assert_close(drawn.mean(0), router.bias.detach(), atol=0.02, rtol=0)
    assert_close(drawn.std(0), 0.1 * router.bias.detach().abs(), atol=0.02, rtol=0)
    assert not drawn[:, 0].any()
    assert drawn[:, 1].var() > 0
    assert abs(torch.corrcoef(drawn[:, 1:].T)[0, 1]) < 0.05  # a draw for each expert


def test_the_log_says_how_inputs_were_routed_since_the_one_before():
    statistics = RoutingStatistics()
    first, second = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    assert statistics.observe(first).item() == pytest.approx(1.3)
    statistics.observe(second)
    assert statistics.read() == {"expert_use": [0.6, 0.4], "routing_confidence": 0.74}
    assert statistics.read() == {}
    statistics.observe(first)
    assert statistics.read() == {"expert_use": [0.5, 0.5], "routing_confidence": 0.65}


def test_standardised_training_coordinates_fold_into_the_same_function():
    router, means = Router(6, 3), 5 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) / 10
    means[:, 4] = 1.5  # a feature that never varies
    router.initialise(torch.Generator().manual_seed(1))
    router.standardize(means)
    standard = SPREAD * (means - means.mean(0)) / means.std(0, correction=0)
    standard[:, 4] = 0
    in_training = router(means, noise=0).detach()
    assert_close(in_training, (standard @ router.weight.T + router.bias).detach(), atol=1e-4, rtol=1e-4)
    router.fold()
    assert torch.equal(router(means, noise=0), in_training)
    assert router.mean is None
    assert router.scale is None


@given(hardness=st.floats(0, 1))
def test_annealing_goes_from_the_soft_gate_to_the_chosen_one(hardness):
    p = torch.tensor([[0.2, 0.7, 0.1]])
    annealed = gate(p, selective=True, probationary=True, hardness=hardness)
    expected = (1 - hardness) * p + hardness * torch.tensor([[0, 0.7, 0]])
    assert_close(annealed, expected)


def test_annealing_is_over_outside_training():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"])
    ids = tokens(8)[None]
    chosen = model.route(ids).gate
    model.encoder.hardness = 0.0
    assert torch.equal(model.route(ids).gate, chosen)


# -- settings that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("pt-moe", {"num_virtual_token": 4}, "unknown key 'num_virtual_token'; did you mean 'num_virtual_tokens'"),
        ("pt-moe", {"num_expert": 4}, "did you mean 'num_experts'"),
        ("dpt", {"rnak": 4}, "did you mean 'rank'"),
        ("pt-moe", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ("pt", {"num_virtual_tokens": -3}, "num_virtual_tokens=-3"),
        ("pt-moe", {"rank": 0}, "rank=0"),
        ("dpt", {"rank": -1}, "rank=-1"),
        ("pt-moe", {"num_experts": 0}, "num_experts=0"),
        ("smop", {"num_experts": -2}, "num_experts=-2"),
        ("attempt", {"bottleneck": 0}, "bottleneck=0"),
        ("ulpt", {"projection_seed": -1}, "projection_seed=-1"),
        ("ulpt", {"rank": 0}, "rank=0"),
        ("id-spam", {"attention_size": 0}, "attention_size=0"),
        ("ept", {"num_spaces": 0}, "num_spaces=0"),
        ("mept", {"num_experts": 0}, "num_experts=0"),
        ("fwd-prompt", {"energy": 0}, "energy=0"),
        ("fwd-prompt", {"energy": 1.5}, "energy=1.5"),
        ("pt-moe", {"router_noise": -0.1}, "router_noise=-0.1"),
        ("pt-moe", {"router_noise": math.nan}, "router_noise=nan"),
        ("pt-moe", {"router_noise": math.inf}, "router_noise=inf"),
        ("pt-moe", {"recipe": "papr"}, "recipe='papr'"),
        ("pt", {"init": "text"}, "give a text"),
        ("pt", {"init_text": "Answer."}, "init='text'"),
        ("pt", {"init": "vocab"}, "init='vocab'"),
        ("pt-moe", {"init": "text", "init_text": ["a", "b", "c"]}, "3 texts for num_experts=2"),
    ],
)
def test_a_setting_that_cannot_be_is_named(method, settings, message):
    with pytest.raises(PtmoeError, match=message):
        METHODS[method](**settings)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(PtmoeError, match=r"rank=0.*; .*unknown key 'num_expert'"):
        PTMoEConfig(rank=0, num_expert=2)


@pytest.mark.parametrize("config", [PTMoEConfig(rank=7, num_virtual_tokens=6), DPTConfig(rank=7, num_virtual_tokens=6)])
def test_a_rank_above_the_virtual_tokens_is_refused(config):
    with pytest.raises(PtmoeError, match=r"rank 7 exceeds min\(T, H\) = 6: lower rank or raise num_virtual_tokens"):
        attach(tiny_llama(), config)


def test_a_rank_above_the_hidden_size_is_refused():
    with pytest.raises(PtmoeError, match=rf"rank {HIDDEN + 1} exceeds min\(T, H\) = {HIDDEN}: lower rank$"):
        attach(tiny_llama(), PTMoEConfig(rank=HIDDEN + 1))
    with pytest.raises(PtmoeError, match="rank 36 exceeds"):
        count_parameters(transformers.LlamaConfig(hidden_size=32), PTMoEConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (METHODS["ulpt"](rank=HIDDEN + 1), f"rank {HIDDEN + 1} exceeds H = {HIDDEN}: lower it"),
        (PTMoEConfig(rank=HIDDEN + 1, frozen_projection=True), f"rank {HIDDEN + 1} exceeds H = {HIDDEN}: lower it"),
        (METHODS["ept"](rank=6, num_decomposed_tokens=5), "exceeds .* = 5: lower rank or raise num_decomposed_tokens"),
        (METHODS["ept"](space_rank=HIDDEN + 1), f"space_rank {HIDDEN + 1} exceeds H = {HIDDEN}: lower it"),
    ],
)
def test_a_size_above_the_matrix_is_refused(config, message):
    with pytest.raises(PtmoeError, match=message):
        attach(tiny_llama(), config)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(PtmoeError, match="has no tokens"):
        attach(tiny_llama(), PTConfig(init="text", init_text=" "), tokenizer=Words())


def test_a_base_without_a_tokenizer_of_its_own_asks_for_one():
    base = tiny_llama()
    base.config._name_or_path = base.name_or_path = "nowhere at all"
    with pytest.raises(PtmoeError, match=r"'nowhere at all' has none that can be loaded .*tokenizer=…"):
        attach(base, PTConfig(init="text", init_text="Answer"))


def test_a_config_cannot_be_changed_but_replaced():
    config = PTMoEConfig(rank=4)
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 5
    assert config.replace(rank=5).rank == 5
    assert config.rank == 4
    with pytest.raises(PtmoeError, match="rank=0"):
        config.replace(rank=0)
