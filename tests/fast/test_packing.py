"""A batch computed without its padding: the same losses and gradients, on every base."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical
from torch.testing import assert_close
from transformers import PreTrainedModel

import ptmoe.fast.loss
from ptmoe import METHODS, PtmoeError, attach
from ptmoe.fast import packing
from ptmoe.fast.last_layer import last_layer_obstacle
from ptmoe.fast.lock import base_lock
from ptmoe.fast.loss import cross_entropy, cross_entropy_in_parts
from ptmoe.fast.packing import SHORT, SIMILAR, groups_of, packing_obstacle
from ptmoe.methods import MethodConfig
from testing.architectures import HIDDEN, VOCABULARY
from testing.bases import BY_ROW, CONFIGS, DEVICE, prompted, tiny, tiny_llama
from testing.losses import ROWS, assert_same, labelled, loss_and_gradients


@pytest.mark.parametrize("lefts", [[0] * 5, [15, 0, 19, 7, 0], [3, 0, 1, 5, 2]], ids=["right", "left", "both"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["PT-MoE selective probationary", "PT"])  # each row its own prompt, and one for all
def test_losses_and_gradients_are_those_of_the_padded_batch(
    base: PreTrainedModel, name: str, implementation: str, lefts: list[int]
) -> None:
    if implementation == "sdpa" and base.config.model_type == "gemma2":
        pytest.skip("Gemma 2's soft cap is refused there")
    base.set_attn_implementation(implementation)
    model = prompted(base, CONFIGS[name]).train()
    base.eval()  # no dropout of the base: the two would draw other numbers
    inputs = labelled(ROWS, lefts)
    assert packing_obstacle(base) is None
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("config", [*CONFIGS.values(), *BY_ROW.values()], ids=[*CONFIGS, *BY_ROW])
def test_every_prompt(config: MethodConfig) -> None:
    model = prompted(tiny_llama(), config).train()
    inputs = labelled(ROWS, [0] * 5)
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("method", ["lora", "hydralora", "ft", "ia3", "vera", "edora", "goat"])
def test_weight_side_methods(method: str) -> None:
    model = attach(tiny_llama(), METHODS[method]()).train()
    inputs = labelled(ROWS, [0] * 5)
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


def test_several_adapters_and_the_base_in_one_batch() -> None:
    model = prompted(tiny_llama(), CONFIGS["PT"], name="a")
    prompted(model, CONFIGS["SMoP"], name="b")
    prompted(model, BY_ROW["PT-MoE with RoAd"], name="c")
    model.train()
    inputs = labelled(ROWS, [0] * 5) | {"adapter_names": ["c", "a", "__base__", "b", "a"]}
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_attend_as_the_first_time(base: PreTrainedModel, reentrant: bool) -> None:
    model = prompted(base, CONFIGS["PT"]).train()
    for module in base.modules():  # the padded batch would draw other numbers
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    inputs = labelled(ROWS, [0] * 5)
    plain = loss_and_gradients(model, inputs, False)
    loss_and_gradients(model, inputs, True)  # tries the base out, which calls its layers, too
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = count_layers(base)
    checkpointed = loss_and_gradients(model, inputs, True)
    assert len(calls) == 2 * base.config.num_hidden_layers  # each was computed again
    assert_same(checkpointed, plain)
    model.gradient_checkpointing_disable()
    assert_same(loss_and_gradients(model, inputs, True), plain)


def count_layers(base: PreTrainedModel) -> list[int]:
    calls: list[int] = []
    norm = [module for name, module in base.named_modules() if name.endswith(("self_attn", ".attn", ".attention"))]
    assert len(norm) == base.config.num_hidden_layers
    for module in norm:
        module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["PT", "DPT"])
@pytest.mark.parametrize("supervised", [4, 5], ids=["the last tokens", "all of a row"])  # of 5, the shortest
def test_what_the_last_virtual_token_of_a_shared_prompt_predicts_counts_for_each_row(
    name: str, supervised: int
) -> None:
    model = prompted(tiny_llama(), CONFIGS[name]).train()
    inputs = labelled(ROWS, [3, 0, 1, 5, 2], supervised)
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_computes_no_padding_and_a_shared_prompt_once(name: str) -> None:
    base = tiny_llama()
    model = prompted(base, CONFIGS[name]).train()
    length, one_for_all = model.num_virtual_tokens, not (CONFIGS[name].reads_input or CONFIGS[name].routes)
    seen: list[tuple[int, ...]] = []
    base.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    model(**labelled(ROWS, [0] * 5))
    assert seen[-1] == (1, sum(map(len, ROWS)) + length * (1 if one_for_all else len(ROWS)), HIDDEN)
    model(**labelled([ROWS[1], ROWS[4]], [0, 0]))  # no padding
    wide = len(ROWS[1])
    once = one_for_all and DEVICE.type == "cpu"
    assert seen[-1] == ((1, length + 2 * wide, HIDDEN) if once else (2, length + wide, HIDDEN))
    model(**labelled(ROWS[:1], [0]))
    assert seen[-1] == (1, length + len(ROWS[0]), HIDDEN)


def test_prompts_of_several_adapters_are_not_taken_for_one() -> None:
    model = prompted(tiny_llama(), CONFIGS["PT"], name="a")
    prompted(model, CONFIGS["PT"], seed=2, name="b")
    model.train()
    for names in (["b"] * 5, ["a", "b", "b", "a", "b"]):
        inputs = labelled(ROWS, [3, 0, 1, 5, 2]) | {"adapter_names": names}
        assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_base_is_left_as_it_was(implementation: str) -> None:
    base = tiny_llama(attn_implementation=implementation)
    model = prompted(base, CONFIGS["PT"]).train()
    before = base.config._attn_implementation
    assert before == implementation
    model(**labelled(ROWS, [0] * 5)).loss.backward()
    assert base.config._attn_implementation == before

    def broken(*_: object) -> None:
        assert base.config._attn_implementation != before
        raise IndexError("in the last layer")

    base.model.layers[-1].register_forward_pre_hook(broken)
    with pytest.raises(IndexError, match="in the last layer"):
        model(**labelled(ROWS, [0] * 5))
    assert base.config._attn_implementation == before


def test_nothing_of_a_packed_batch_stays_behind() -> None:
    base = tiny_llama()
    model = prompted(base, CONFIGS["PT"]).train()
    model.gradient_checkpointing_enable()
    name = "_gradient_checkpointing_func"
    functions = {module: getattr(module, name) for module in base.modules() if hasattr(module, name)}
    model(**labelled(ROWS, [0] * 5)).loss.backward()
    assert functions
    assert all(getattr(module, name) is function for module, function in functions.items())
    with ThreadPoolExecutor() as threads:
        assert threads.submit(base_lock(base).acquire, blocking=False).result()
    with pytest.raises(LookupError):
        packing._current.get()


def bloom() -> PreTrainedModel:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2, n_head=4)
    return BloomForCausalLM(config).to(DEVICE).eval()


def test_a_base_that_cannot_is_computed_with_its_padding_and_that_is_said_once() -> None:
    model = prompted(bloom(), CONFIGS["PT"]).train()
    inputs = labelled(ROWS, [0] * 5)
    with pytest.warns(UserWarning, match="cannot be packed with BloomForCausalLM"):
        automatic = loss_and_gradients(model, inputs, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loss_and_gradients(model, inputs, None)
    padded = loss_and_gradients(model, inputs, False)
    assert_same(automatic, padded)
    assert_same(again, padded)
    with pytest.raises(PtmoeError, match="cannot be packed with BloomForCausalLM"):
        loss_and_gradients(model, inputs, True)


def test_packing_cannot_be_asked_for_where_the_prompt_stands_in_the_cache() -> None:
    model = attach(tiny_llama(), METHODS["prefix-tuning"](num_virtual_tokens=4)).train()
    inputs = labelled(ROWS, [0] * 5)
    loss_and_gradients(model, inputs, None)
    with pytest.raises(PtmoeError, match="cache"):
        loss_and_gradients(model, inputs, True)


MIXES = {
    # As a state-space layer or a convolution has it.
    "what came before": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "what comes after": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1))[:, 1:],
    "all of them": lambda x: x.mean(1, keepdim=True),
    "their places": lambda x: torch.arange(x.shape[1], device=x.device)[:, None].to(x.dtype).expand_as(x) / 10,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MIXES)
def test_a_base_whose_layers_mix_tokens_is_found_out(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama().to(dtype)
    assert packing_obstacle(base) is None
    mlp = base.model.layers[0].mlp
    forward, mixed = mlp.forward, MIXES[kind]
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) + 0.5 * mixed(x))
    reason = packing_obstacle(base)
    assert reason is not None
    assert "mix tokens" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deep_base_in_half_precision_is_not_taken_for_one_that_mixes_tokens(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a matrix product of another shape is another number, by a little in each layer."""
    base = tiny_llama().to(dtype)
    mlp = base.model.layers[0].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) + 0.05 * (x.shape[1] % 5) * x)
    assert (packing_obstacle(base) is None) == (dtype == torch.bfloat16)


def test_a_window_that_only_the_masks_know_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    base = tiny("mistral")
    real = modeling_mistral.ALL_ATTENTION_FUNCTIONS.get_interface

    def without_window(*arguments: object) -> object:
        def attend(*tensors: object, sliding_window: int | None = None, **options: object) -> object:
            return real(*arguments)(*tensors, **options)

        return attend

    monkeypatch.setattr(modeling_mistral.ALL_ATTENTION_FUNCTIONS, "get_interface", without_window)
    assert "window" in str(packing_obstacle(base))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_groups_hold_every_token_once_beside_similar_rows(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    groups = groups_of(lengths, torch.device("cpu"))
    assert [group.start for group in groups] == [0, *(group.stop for group in groups)][: len(groups)]
    assert (groups[-1].stop if groups else 0) == sum(lengths)
    remaining = [length for length in lengths if length]
    for group in groups:
        rows, remaining = remaining[: group.rows], remaining[group.rows :]
        assert rows[0] == group.longest
        assert group.longest <= SHORT or rows[-1] >= SIMILAR * group.longest
        if group.padded is None:
            assert set(rows) == {group.longest}
            continue
        assert group.real is not None
        padded = group.padded.view(group.rows, group.longest)
        expected = torch.arange(group.stop - group.start).split(rows)
        for row, tokens_ in zip(padded, expected, strict=True):
            assert row[: len(tokens_)].tolist() == tokens_.tolist()
            assert set(row.tolist()) == set(tokens_.tolist())  # never another row's
        assert group.padded[group.real].tolist() == list(range(group.stop - group.start))
    assert not remaining


# -- the loss in parts -------------------------------------------------------------------------------------------------


def test_a_trial_leaves_every_part_of_the_base_in_its_mode() -> None:
    base = tiny_llama().train()
    base.model.layers[0].eval()
    modes = [module.training for module in base.modules()]
    assert packing_obstacle(base) is None
    assert last_layer_obstacle(base) is None
    assert [module.training for module in base.modules()] == modes
    assert packing_obstacle(tiny("gpt2").train()) is None  # its dropout is off


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_in_parts_is_the_loss(base: PreTrainedModel, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits after the head: it has to happen in parts as well."""
    model = prompted(base, CONFIGS["PT-MoE selective probationary"]).train()
    base.eval()
    inputs = labelled(ROWS, [0, 0, 19, 0, 0], supervised=3)
    whole = loss_and_gradients(model, inputs, packing)
    assert model.fast_paths()["loss_in_parts"] is None  # tried out here, once
    largest: list[int] = []
    base.get_output_embeddings().register_forward_hook(lambda _, __, out: largest.append(out.shape[:-1].numel()))
    monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", 4 * VOCABULARY + 1)
    assert_same(loss_and_gradients(model, inputs, packing), whole)
    assert max(largest) == 4
    assert len(largest) == 1 + 4  # one position on the way through, then 15 in parts of 4


def test_the_loss_in_parts_of_a_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted(tiny_llama(), CONFIGS["PT"]).train()
    inputs = labelled(ROWS, [0] * 5, supervised=3) | {"num_items_in_batch": torch.tensor(40)}
    whole = loss_and_gradients(model, inputs, None)
    monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", 4 * VOCABULARY)
    assert_same(loss_and_gradients(model, inputs, None), whole)


def test_a_head_that_trains_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_llama(), METHODS["ft"]()).train()
    inputs = labelled(ROWS, [0] * 5)
    whole = loss_and_gradients(model, inputs, None)
    monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", 4 * VOCABULARY)
    assert_same(loss_and_gradients(model, inputs, None), whole)
    assert any("lm_head" in name or "embed_tokens" in name for name in whole)


def test_statistics_of_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prompted(tiny_llama(), CONFIGS["PT"]).train()
    inputs = labelled(ROWS, [0] * 5, supervised=3)
    found = []
    for logits_at_once, skip in ((2**25, True), (4 * VOCABULARY, True), (2**25, False)):
        monkeypatch.setattr("ptmoe.fast.paths.LOGITS_AT_ONCE", logits_at_once)
        statistics = ptmoe.fast.loss.TokenStatistics()
        model(**inputs, token_statistics=statistics, skip_logits=skip)
        found.append((float(statistics.entropy), float(statistics.correct), statistics.count))
    assert found[0][2] == 3 * len(ROWS)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_in_half_precision_parts_have_the_loss_gradient_and_statistics_of_the_whole_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, HIDDEN, generator=generator).bfloat16() for n in (300, VOCABULARY))
    targets = torch.randint(VOCABULARY, (300,), generator=generator)
    statistics = ptmoe.fast.loss.TokenStatistics()
    found = []
    for loss in (
        lambda states: cross_entropy(states @ head.T, targets, 400),
        lambda states: cross_entropy_in_parts(states, targets, 400, lambda part: part @ head.T, 7, statistics),
    ):
        states = hidden.clone().requires_grad_()
        value = loss(states)
        value.backward()
        found.append((value.detach(), states.grad))
    assert found[1][0].dtype == torch.float32
    assert_close(found[1][0], found[0][0], atol=0, rtol=1e-5)
    assert_close(found[1][1], found[0][1], atol=1e-4, rtol=0.02)
    logits = (hidden @ head.T).float()
    assert float(statistics.entropy) == pytest.approx(Categorical(logits=logits).entropy().sum().item(), rel=1e-5)
    assert (int(statistics.correct), statistics.count) == (int((logits.argmax(1) == targets).sum()), 300)
