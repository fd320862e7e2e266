"""PT-MoE with RoAd: the formula, and each row's own rotations wherever the base computes several rows."""

from copy import deepcopy
from threading import Thread
from time import sleep

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from transformers import TrainingArguments

import ptmoe
from ptmoe.errors import PtmoeError
from ptmoe.fast.compiled import compile_layers
from ptmoe.fast.lock import base_lock
from ptmoe.methods import METHODS
from ptmoe.methods.by_row import RowChanges
from ptmoe.methods.pt_moe_road import rotated
from ptmoe.methods.weights import features_of, modules_named
from ptmoe.models.attach import attach
from ptmoe.models.decoding import Decoder
from ptmoe.train.data import collate
from ptmoe.train.routing import prompt_gradients
from ptmoe.train.trainer import PromptTrainer
from testing.architectures import ARCHITECTURES
from testing.bases import DEVICE, array, batch, prompted, tiny, tiny_llama, tokens
from testing.decoding import ROWS, decoded, generated
from testing.losses import ROWS as LONG
from testing.losses import assert_same, labelled, loss_and_gradients

CONFIG = METHODS["pt-moe-road"](num_virtual_tokens=4, num_experts=3, rank=3)


def routed(base):
    """An adapter with every number drawn, whose router sends the rows of `LONG` to different experts."""
    model = prompted(base, CONFIG).eval()
    router = model.encoder.router
    with torch.no_grad():
        router.bias.copy_(
            -router.weight @ torch.stack([base.get_input_embeddings()(row).mean(0) for row in LONG]).mean(0)
        )
        router.weight *= 5
        router.bias *= 5
    assert len({int(model.route(row[None]).gate.argmax()) for row in LONG}) > 1
    return model


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    return routed(tiny(request.param))


def by_hand(model, row):
    """The logits of one row, its prompt and rotations computed in numpy on the untouched base."""
    base, encoder = tiny(model.base_model.config.model_type), model.encoder
    embeds, tensors = array(base.get_input_embeddings()(row)), {k: array(v) for k, v in encoder.tensors().items()}
    logits = tensors["router.weight"] @ embeds.mean(0) + tensors["router.bias"]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = probabilities.argmax()
    prompt, numbers = (probabilities[best] * part for part in (tensors["A"][best] @ tensors["B"], tensors["R"][best]))
    start = 0
    for module in modules_named(base, model.method_config.target_modules).values():

        def rotate(module, arguments, output, start=start):
            y, half = array(output), output.shape[-1] // 2
            a, b = numbers[start : start + half], numbers[start + half : start + 2 * half]
            rotated = (y[..., :half] + 1j * y[..., half:]) * (1 + a + 1j * b)
            return torch.from_numpy(np.concatenate([rotated.real, rotated.imag], -1)).to(output)

        start += features_of(module)[1]
        module.register_forward_hook(rotate)
    assert start == numbers.size
    spliced = torch.from_numpy(np.concatenate([prompt, embeds])).to(row.device, torch.float32)
    return base(inputs_embeds=spliced[None]).logits[0, len(prompt) :]


def test_each_row_of_a_batch_is_rotated_by_the_numbers_of_its_own_expert(model):
    ids, mask = batch(LONG, [3, 0, 7, 1, 2])
    logits = model(ids, mask).logits
    for row, scores, real in zip(LONG, logits, mask.bool(), strict=True):
        assert_close(scores[real], by_hand(model, row), atol=2e-4, rtol=1e-4)


def test_it_starts_as_its_prompt_alone_and_a_pass_of_the_bases_own_stays_that(model):
    ids, base = tokens(9)[None], tiny(model.base_model.config.model_type)
    untouched, states = base(ids).logits, base.base_model(ids)[0]
    sizes = {"num_virtual_tokens": 4, "num_experts": 3, "rank": 3}
    prompt_alone = attach(base, METHODS["pt-moe"](**sizes))(ids).logits
    assert torch.equal(attach(base, METHODS["pt-moe-road"](**sizes))(ids).logits, prompt_alone)
    assert not torch.allclose(model(ids).logits, prompt_alone, atol=1e-3)
    assert torch.equal(model.base_model.base_model(ids)[0], states)  # nothing is left of a pass, whatever comes next
    assert torch.equal(model.base_model(ids).logits, untouched)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, untouched)


def hooks_on(base):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.modules())


def test_all_adapters_on_a_base_share_its_hooks_which_leave_with_the_last_of_them():
    base, ids = tiny_llama(), tokens(9)[None]
    model = prompted(base, CONFIG, name="a")
    hooks, expected = hooks_on(base), model(ids).logits
    prompted(model, CONFIG.replace(num_experts=2), seed=2, name="b")
    other = prompted(base, CONFIG, seed=3)
    assert hooks_on(base) == hooks > 0
    assert torch.equal(model(ids, adapter_names=["a"]).logits, expected)
    assert not torch.allclose(other(ids).logits, expected, atol=1e-3)
    model.delete_adapter("a")
    assert hooks_on(base) == hooks
    elsewhere = prompted(base, CONFIG.replace(target_modules=["q_proj"]), seed=4)
    assert hooks_on(base) > hooks
    other.set_adapter("default")
    assert torch.equal(elsewhere(ids).logits, prompted(tiny_llama(), elsewhere.method_config, seed=4)(ids).logits)
    assert torch.equal(other(ids).logits, prompted(tiny_llama(), CONFIG, seed=3)(ids).logits)


def in_threads(base, *calls):
    """Calls of other threads that wait for a pass on the base, and a last one that is made during it."""
    with base_lock(base):
        threads = [Thread(target=call) for call in calls[:-1]]
        for thread in threads:
            thread.start()
        sleep(0.1)
        calls[-1]()
    for thread in threads:
        thread.join()


def test_hooks_that_threads_ask_for_and_give_back_at_once_are_there_once():
    base = tiny_llama()
    modules, made = modules_named(base, ["v_proj"]), []

    def come():
        made.append(RowChanges.on(base, modules, rotated))

    in_threads(base, come, come, lambda: None)
    assert made[0] is made[1]
    assert hooks_on(base) == 2 + len(modules)
    made[0].release(base)
    in_threads(base, lambda: made[0].release(base), come)
    assert hooks_on(base) == 2 + len(modules)
    made[0].release(base)
    assert hooks_on(base) == 0


def test_hooks_come_and_leave_between_passes():
    base, taken = tiny_llama(), []
    modules = modules_named(base, ["v_proj"])
    in_threads(base, lambda: taken.append(RowChanges.on(base, modules, rotated)), lambda: taken.append(hooks_on(base)))
    before, by_row = taken
    assert (before, hooks_on(base)) == (0, 2 + len(modules))
    in_threads(base, lambda: by_row.release(base), lambda: taken.append(hooks_on(base)))
    assert (taken[-1], hooks_on(base)) == (2 + len(modules), 0)
    held = RowChanges.on(base, modules, rotated)
    with base_lock(base):  # another adapter comes and leaves without waiting
        thread = Thread(target=lambda: RowChanges.on(base, modules, rotated).release(base))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    held.release(base)


def test_a_saved_adapter_is_tried_and_loaded_beside_others(tmp_path):
    ids = tokens(9)[None]
    model = prompted(tiny_llama(), CONFIG)
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    for name in ("a", "b"):
        ptmoe.load_adapter(model, tmp_path, name=name)
        assert torch.equal(model(ids, adapter_names=[name]).logits, expected)
    assert model.active_adapter == "default"
    assert all(one.requires_grad == name.startswith("encoders.default.") for name, one in model.named_parameters())


def test_an_adapter_changes_the_modules_that_are_there_when_it_comes():
    base, ids = tiny_llama(), tokens(9)[None]
    model = prompted(base, METHODS["pt"](num_virtual_tokens=2), name="pt")
    expected = prompted(model, CONFIG, name="rows")(ids).logits
    model.set_adapter("pt")
    model.delete_adapter("rows")
    for layer in base.model.layers:
        layer.self_attn.v_proj = deepcopy(layer.self_attn.v_proj)
    assert torch.equal(prompted(model, CONFIG, name="rows")(ids).logits, expected)


def test_rows_of_adapters_that_change_different_modules_share_a_batch():
    targets = [["v_proj"], ["k_proj"], ["v_proj", "gate_proj"]]  # v_proj and k_proj are of one size
    model = tiny_llama()
    for index, names in enumerate(targets):
        model = prompted(model, CONFIG.replace(target_modules=names), seed=index + 1, name=str(index))
    order = ["2", "0", "__base__", "1", "0"]
    ids, mask = batch(LONG, [3, 0, 7, 1, 2])
    logits = model.eval()(ids, mask, adapter_names=order).logits
    made = model.generate(ids, mask, adapter_names=order, max_new_tokens=5)[:, ids.shape[1] :]
    for row, name, scores, real, new in zip(LONG, order, logits, mask.bool(), made, strict=True):
        assert_close(scores[real], model(row[None], adapter_names=[name]).logits[0], atol=1e-5, rtol=1e-4)
        assert torch.equal(new, model.generate(row[None], adapter_names=[name], max_new_tokens=5)[0, len(row) :])
    inputs = labelled(LONG, [3, 0, 1, 5, 2]) | {"adapter_names": order}
    for encoder in model.train().encoders.values():
        encoder.requires_grad_(True)
    expected = loss_and_gradients(model, inputs, False)
    assert_same(loss_and_gradients(model, inputs, True), expected)
    model.gradient_checkpointing_enable()
    assert_same(loss_and_gradients(model, inputs, True), expected)


@pytest.mark.parametrize("active", [True, False])
def test_what_does_not_fit_leaves_no_hooks(active, tmp_path):
    base = tiny_llama()
    before = hooks_on(base)
    model = attach(base, METHODS["pt"](num_virtual_tokens=2), adapter_name="pt")
    if active:
        attach(model, CONFIG, adapter_name="rows")
        model.delete_adapter("pt")
    hooks = hooks_on(base)
    assert (hooks > before) == active
    base.model.layers[0].idle = torch.nn.Linear(32, 32)
    with pytest.raises(PtmoeError, match="none of the modules that it changes computes text"):
        attach(model, CONFIG.replace(target_modules=["idle"]), adapter_name="idle")
    prompted(tiny_llama(), CONFIG).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    save_file(saved | {"R": saved["R"][:, 2:].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PtmoeError, match="R has shape"):
        ptmoe.load_adapter(model, tmp_path, name="shorter")
    assert hooks_on(base) == hooks
    assert list(model.encoders) == [model.active_adapter] == ["rows" if active else "pt"]


def test_losses_and_gradients_are_those_of_the_padded_batch(model):
    inputs = labelled(LONG, [3, 0, 1, 5, 2])
    for module in model.base_model.modules():  # a packed batch would draw other numbers
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.train()
    assert_same(loss_and_gradients(model, inputs, True), loss_and_gradients(model, inputs, False))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_computed_again_find_the_rotations_of_their_own_pass(packing, reentrant):
    """Two passes before the backward pass, as in training on pairs."""
    model = routed(tiny_llama()).train()
    model.packing = packing
    pairs = [labelled(LONG, [0] * 5), labelled(LONG[::-1], [0] * 5)]

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        first, second = (model(**one).loss for one in pairs)
        (first - 0.3 * second).backward()
        return {name: one.grad.clone() for name, one in model.encoder.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(), expected)


@pytest.mark.parametrize("config", [CONFIG, METHODS["pt"](num_virtual_tokens=2)])
def test_layers_computed_again_keep_other_threads_out(config):
    """Also those of a pass that changes nothing: in the other thread some may."""
    model = prompted(tiny_llama(), config).train()
    model.packing = False
    model.gradient_checkpointing_enable()
    loss, lock, taken = model(**labelled(LONG, [0] * 5)).loss, base_lock(model.base_model), []

    def in_another_thread(*_):
        thread = Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
        thread.start()
        thread.join()

    with model.base_model.model.layers[0].self_attn.v_proj.register_forward_hook(in_another_thread):
        loss.backward()
    assert taken == [False]


@pytest.mark.slow
def test_one_compilation_serves_all_layers():
    """Of more than `torch._dynamo.config.recompile_limit`, those beyond it would stay as they are."""
    torch.compiler.reset()
    counter = CompileCounter()
    model = routed(tiny_llama(num_hidden_layers=10)).train()
    inputs = labelled(LONG, [0] * 5)
    plain = loss_and_gradients(model, inputs, False)
    assert compile_layers(model.base_model, counter) is None
    assert counter.frame_count == 1
    assert_same(loss_and_gradients(model, inputs, False), plain)
    assert 1 < counter.frame_count < 5
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("on_the_same_base", [True, False])
def test_layers_that_were_compiled_without_rotations_find_those_that_come_later(on_the_same_base):
    torch.compiler.reset()
    ids = tokens(9)[None]
    expected = prompted(tiny_llama(), CONFIG)(ids).logits
    model = prompted(tiny_llama(), METHODS["pt"](num_virtual_tokens=2), name="pt")
    assert compile_layers(model.base_model, "eager") is None
    if not on_the_same_base:
        model = tiny_llama()
        assert compile_layers(model, "eager") is None
    assert_close(prompted(model, CONFIG, name="rows")(ids).logits, expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_an_interrupted_pass_leaves_nothing_for_the_layers_that_later_ones_compute_again(interrupted, packing):
    model = routed(tiny_llama()).train()
    model.gradient_checkpointing_enable()
    inputs, others = labelled(LONG, [3, 0, 1, 5, 2]), labelled(LONG[:3], [0] * 3)
    layers = model.base_model.model.layers
    own = layers[0]._gradient_checkpointing_func
    expected = loss_and_gradients(model, inputs, packing)
    model.packing = interrupted
    with layers[1].register_forward_pre_hook(_interrupt), pytest.raises(KeyboardInterrupt):
        model(**others)
    assert_same(loss_and_gradients(model, inputs, packing), expected)
    assert layers[0]._gradient_checkpointing_func is own


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.ci
def test_generation_gives_each_row_the_tokens_that_it_gets_alone(model, options):
    rows = [torch.tensor(row, device=DEVICE) for row in ROWS]
    ids, mask = batch(rows, [0, 4, 1, 2, 0])
    made = model.generate(ids, mask, max_new_tokens=5, **options).unflatten(0, (len(rows), -1))
    for row, several in zip(rows, made, strict=True):
        alone = model.generate(row[None], max_new_tokens=5, **options)
        assert torch.equal(several[:, ids.shape[1] :], alone[:, len(row) :])
    assert torch.equal(model.base_model(ids).logits, tiny(model.base_model.config.model_type)(ids).logits)


@pytest.mark.ci
def test_rows_that_end_leave_the_batch_and_take_their_rotations_along(model):
    expected = generated(model)
    last = [row[index] for index, row in enumerate(expected)]  # row 0 ends at once, row 4 after five tokens
    made = decoded(Decoder(model), ended=lambda row: row[-1] in last)
    for found, whole in zip(made, expected, strict=True):
        assert found == whole[: next((i + 1 for i, token in enumerate(whole) if token in last), len(whole))]


def test_gradients_for_the_routers_start_are_each_rows_own():
    model = attach(tiny_llama(), CONFIG)
    inputs = labelled(LONG, [3, 0, 1, 5, 2])
    together = prompt_gradients(model, inputs)
    assert together.shape == (5, 4 * 32)
    for row, gradient in zip(LONG, together, strict=True):
        assert_close(prompt_gradients(model, labelled([row], [0]))[0], gradient, atol=1e-5, rtol=1e-4)


def test_training_parts_the_experts_and_folds_what_they_share(tmp_path):
    model = attach(tiny_llama(), CONFIG.replace(router_test=False))
    rows = [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.where(torch.arange(6) > 4, ids, -100),
        }
        for ids in (tokens(6, seed).cpu() for seed in range(40))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=0.03,
        report_to=[],
        disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu",
    )
    callbacks = [ptmoe.RoutingCallback()]
    PromptTrainer(model, arguments, collate, train_dataset=rows, callbacks=callbacks).train()
    encoder = model.encoder
    assert encoder.S is encoder.shared_R is None
    assert encoder.tensors().keys() == {"A", "B", "R", "router.weight", "router.bias"}
    for experts in (encoder.A, encoder.R):
        assert not any(torch.equal(experts[i], experts[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    model.save_pretrained(tmp_path / "adapter")
    again = ptmoe.load_adapter(tiny_llama(), tmp_path / "adapter").eval()
    ids, mask = batch(LONG, [0] * 5)
    assert torch.equal(again(ids, mask).logits, model.eval()(ids, mask).logits)


@pytest.mark.parametrize("packing", [True, False])
def test_the_feed_forward_part_of_the_last_layer_is_rotated_at_every_position_and_the_fast_paths_say_so(packing):
    model = prompted(tiny_llama(), CONFIG.replace(target_modules=["gate_proj", "down_proj"])).train()
    inputs = labelled(LONG, [3, 0, 1, 5, 2])
    narrow = loss_and_gradients(model, inputs, packing)
    assert model.fast_paths()["last_layer"] == "each row of a batch changes the layers in its own way"
    model._fast._tried["last_layer"] = "not in this test"
    assert_same(loss_and_gradients(model, inputs, packing), narrow)
    with model.disable_adapter():
        model._fast._tried.clear()
        assert model.fast_paths()["last_layer"] is None


def test_a_module_tells_its_sizes_without_its_weight():
    """That of a base which ZeRO-3 shares is empty while nothing is computed."""
    base = tiny("gpt2")
    modules = modules_named(base, ["c_attn", "c_proj"])
    sizes = [module.weight.shape for module in modules.values()]
    for module in modules.values():
        module.weight.data = module.weight.new_empty(0)
    assert [features_of(module) for module in modules.values()] == sizes
    config = METHODS["pt-moe-road"](target_modules=["c_attn", "c_proj"], num_virtual_tokens=4, num_experts=3, rank=3)
    assert config.encoder_for(base).R.shape == (3, sum(size[1] for size in sizes))


def test_a_base_may_be_spread_over_devices():
    model = routed(tiny_llama())
    base = model.base_model

    def moved(_, *inputs):
        return tree_map(lambda one: one.to("meta") if isinstance(one, torch.Tensor) else one, inputs)

    for module in (base.model.layers[1], base.model.norm, base.lm_head):
        module.to("meta").register_forward_pre_hook(moved, with_kwargs=True)
    ids, mask = batch(LONG, [0] * 5)
    assert model(ids, mask).logits.device.type == "meta"


def test_modules_that_do_not_know_their_row_or_have_an_odd_output_are_refused():
    base = tiny_llama()
    base.model.layers[1].self_attn.odd = torch.nn.Linear(32, 15)
    with pytest.raises(PtmoeError, match=r"rotates pairs of outputs, and model\.layers\.1\.self_attn\.odd has 15"):
        attach(base, CONFIG.replace(target_modules=["odd"]))
    base, flat = (
        tiny_llama(),
        torch.nn.Linear(32, 32).to(DEVICE),
    )  # as experts of a layer see tokens, without their rows
    base.model.layers[0].mlp.flat = flat
    base.model.layers[0].mlp.register_forward_pre_hook(lambda _, inputs: (flat(inputs[0].flatten(0, 1)), None)[1])
    with pytest.raises(PtmoeError, match=r"nothing tells which are whose.*: name other target_modules"):
        attach(base, CONFIG.replace(target_modules=["flat"]))(tokens(6)[None])
