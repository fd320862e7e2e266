"""Methods between LoRA and the weight's own factors: each against its formula in numpy, its start and its count."""

import numpy as np
import pytest
import torch
import transformers
from torch.testing import assert_close

from ptmoe.adapters.folder import WEIGHTS_FILE
from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS
from ptmoe.methods.parts import weight_of
from ptmoe.models.attach import attach, count_parameters
from testing.bases import DEVICE, LLAMA_1B, array, batch, tiny, tokens
from testing.losses import answers

SIZES = {
    "nlora": {"rank": 3},
    "nora": {"rank": 6, "inner_rank": 2},
    "msplora": {"rank": 5, "num_groups": 2},
    "lotr": {"rank": 3},
    "compacter": {"width": 3, "rank": 2},
    "ba-lora": {"rank": 2},
    "ffa-lora": {"rank": 2},
}
PARTS = ["nlora", "nora", "msplora", "lotr", "compacter"]
EVERYWHERE = ["llama", "gpt2", "opt", "phi", "gpt_neox"]


def attached(method, base, **fields):
    return attach(base, METHODS[method](**(SIZES[method] | fields)), seed=1)


def drawn(method, base, **fields):
    """Every tensor drawn, what is frozen as well."""
    model = attached(method, base, **fields)
    generator = torch.Generator().manual_seed(7)
    for value in model.encoder.tensors().values():
        value.copy_(torch.randn(value.shape, generator=generator) / 3)
    return model


def seen(model):
    """`x`, the module's own output and what it gives with its part, float64, for each target module."""
    own, inputs, changed, handles = {}, {}, {}, []
    for key in model.encoder.parts:
        name = key.replace("/", ".")
        module = model.base_model.get_submodule(name)
        handles.append(
            module.register_forward_hook(
                lambda module, x, y, name=name: (
                    inputs.update({name: array(x[0][0])}),
                    own.update({name: array(x[0][0]) @ array(weight_of(module)).T + bias_of(module)}),
                    changed.update({name: array(y[0])}),
                )[0]
            )
        )
    with torch.no_grad():
        model(tokens(6)[None])
    for handle in handles:
        handle.remove()
    return inputs, own, changed


def bias_of(module):
    return 0 if module.bias is None else array(module.bias)


def kind_and_layer(name, shape):
    """Independent of the program's: the tiny bases number their layers 0 and 1."""
    left, layer, right = name.replace(".0.", ".!0!.").replace(".1.", ".!1!.").split("!")
    return f"shared.{left}{right[1:]}.{shape[1]}x{shape[0]}", int(layer)


def by_hand(method, name, tensors, y, shape, scaling):
    """The matrix `(out, in)` that a part adds, or, of compacter, its output for `y`."""
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    if method == "nlora":
        return own["B"] @ own["N"] @ own["A"] - own["start_B"] @ own["start_N"] @ own["start_A"]
    if method == "nora":
        return own["B"] @ own["inner_B"] @ own["inner_A"] @ own["A"]
    if method == "compacter":
        rules = tensors["shared.A"]
        down, up = (
            sum(np.kron(rule, left @ right) for rule, left, right in zip(rules, own[first], own[second], strict=True))
            for first, second in (("s", "t"), ("u", "v"))
        )
        hidden = torch.nn.functional.gelu(torch.tensor(y @ down.T)).numpy()
        return hidden @ up.T
    kind, layer = kind_and_layer(name, shape)
    if method == "lotr":
        return scaling * tensors[f"{kind}.U"] @ own["G"] @ tensors[f"{kind}.V"]
    pairs = [
        (tensors[f"{kind}.all.B"][0], tensors[f"{kind}.all.A"][0]),
        (tensors[f"{kind}.groups.B"][layer], tensors[f"{kind}.groups.A"][layer]),  # two layers, two groups
        (own["own.B"][0], own["own.A"][0]),
    ]
    return scaling * sum(b @ a for b, a in pairs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", PARTS)
def test_a_module_gives_what_the_formula_says(method, architecture):
    model = drawn(method, tiny(architecture))
    tensors = {key: array(value) for key, value in model.encoder.tensors().items()}
    inputs, own, changed = seen(model)
    assert len(changed) == (2 if architecture == "gpt2" and method != "compacter" else 4)
    for name, y in own.items():
        shape = weight_of(model.base_model.get_submodule(name)).shape
        added = by_hand(method, name, tensors, y, shape, getattr(model.method_config, "scaling", 1))
        expected = y + (added if method == "compacter" else inputs[name] @ added.T)
        np.testing.assert_allclose(changed[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", EVERYWHERE)
@pytest.mark.parametrize("method", SIZES)
def test_a_fresh_adapter_leaves_the_base_as_it_was(method, architecture):
    row = tokens(8)[None]
    base = tiny(architecture)
    before = base(row).logits
    assert_close(attached(method, base)(row).logits, before, atol=2e-5, rtol=1e-5)


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nloras_start_is_the_weight_itself_on_the_rows_and_columns_it_takes(architecture):
    model = attached("nlora", tiny(architecture), rank=5)
    for module, part in model.encoder.targets:
        weight = array(weight_of(module))
        product = array(part.start_B) @ array(part.start_N) @ array(part.start_A)
        same = np.abs(product - weight) < 1e-5
        assert (same.all(1).sum(), same.all(0).sum()) == (5, 5)
        assert np.linalg.matrix_rank(product, tol=1e-4) == 5
        assert np.linalg.norm(product, 2) < 4 * np.linalg.norm(weight, 2)
        for name in "ANB":
            assert torch.equal(getattr(part, name), getattr(part, f"start_{name}"))


def test_nlora_starts_from_a_weight_of_lower_rank_than_its_own():
    base = tiny()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "q_proj" in name:
                parameter.copy_(torch.outer(parameter[:, 0], parameter[0]))
            if "v_proj" in name:
                parameter.zero_()
    for module, part in attached("nlora", base, rank=4).encoder.targets:
        assert_close(part.start_B @ part.start_N @ part.start_A, weight_of(module), atol=1e-5, rtol=1e-4)


def test_inttune_trains_the_intermediate_matrix_alone():
    model = attached("nlora", tiny(), intermediate_only=True)
    assert {name.rpartition(".")[2] for name, _ in model.encoder.named_parameters()} == {"N"}
    assert model.num_parameters(only_trainable=True) == 4 * 3**2
    with torch.no_grad():
        for _, part in model.encoder.targets:
            part.N.add_(torch.eye(3, device=DEVICE))
    inputs, own, changed = seen(model)
    for module, part in model.encoder.targets:
        added = array(part.start_B) @ array(part.start_A)
        np.testing.assert_allclose(
            changed[part.name], own[part.name] + inputs[part.name] @ added.T, rtol=1e-4, atol=1e-4
        )
        assert weight_of(module).shape == added.shape


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_noras_frozen_pair_is_the_best_product_of_its_rank(architecture):
    model = attached("nora", tiny(architecture))
    for module, part in model.encoder.targets:
        left, values, right = np.linalg.svd(array(weight_of(module)), full_matrices=False)
        np.testing.assert_allclose(
            array(part.B) @ array(part.A), (left[:, :6] * values[:6]) @ right[:6], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose((array(part.A) ** 2).sum(1), values[:6], rtol=1e-4)
        np.testing.assert_allclose((array(part.B) ** 2).sum(0), values[:6], rtol=1e-4)


def test_ffa_lora_trains_b_alone_with_the_trainers_optimizer():
    model = attached("ffa-lora", tiny())
    assert model.encoder.optimizer(1e-3, 0.0) is None
    assert all(
        ("lora_B" in name) == parameter.requires_grad
        for name, parameter in model.base_model.named_parameters()
        if "lora_" in name
    )


# -- counts ------------------------------------------------------------------------------------------------------------

LLAMA_2_7B = transformers.LlamaConfig()  # its defaults are that model's
Q, V, L, H = 2048 + 2048, 2048 + 512, 16, 2048
COUNTS = {
    "nlora": ({"rank": 3}, L * 3 * (Q + V + 2 * 3)),
    "nlora, n alone": ({"rank": 3, "intermediate_only": True}, L * 2 * 9),
    "nora": ({"rank": 32}, L * 2 * 2 * 32 * 8),
    "nora of another inner rank": ({"rank": 32, "inner_rank": 3}, L * 2 * 2 * 32 * 3),
    "msplora": ({"rank": 8, "num_groups": 3}, (Q + V) * (8 + 3 * 4 + 16 * 2)),
    "msplora of the least ranks": ({"rank": 1, "num_groups": 1}, (Q + V) * (1 + 1 + 16)),
    "lotr": ({"rank": 5}, 5 * (Q + V) + 2 * L * 25),
    "compacter": ({"phm_dim": 4, "width": 6, "rank": 1}, L * 2 * 2 * (H + 24) + 64),
    "compacter of another rank": ({"phm_dim": 8, "width": 3, "rank": 2}, L * 2 * 2 * 2 * (H + 24) + 512),
    "ba-lora": ({"rank": 3}, L * 3 * (Q + V)),
    "ffa-lora": ({"rank": 3}, L * 3 * (2048 + 512)),
}


@pytest.mark.parametrize("case", COUNTS)
def test_the_count_is_the_formula(case):
    sizes, expected = COUNTS[case]
    method = case.split(" ")[0].strip(",")
    assert count_parameters(LLAMA_1B, METHODS[method](**sizes)) == expected


def test_nloras_intermediate_matrices_are_as_many_numbers_as_its_abstract_says():
    """3.67 million more than LoRA on LLaMA-2-7B, which is rank 128 on all seven projections."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora, nlora = (
        count_parameters(LLAMA_2_7B, METHODS[method](rank=128, target_modules=modules)) for method in ("lora", "nlora")
    )
    assert nlora - lora == 3_670_016


# -- what is shared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["msplora", "lotr", "compacter"])
def test_what_layers_share_is_in_the_folder_once(method, tmp_path):
    from safetensors.torch import load_file

    model = drawn(method, tiny())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS_FILE)
    assert sum(value.numel() for value in saved.values()) == model.num_parameters(only_trainable=True)
    shared = {key.rpartition(".")[2] for key in saved if key.startswith("shared.")}
    assert shared == ({"U", "V"} if method == "lotr" else {"A", "B"} if method == "msplora" else {"A"})


@pytest.mark.parametrize("method", ["msplora", "lotr"])
def test_modules_of_one_name_and_different_shapes_share_nothing(method):
    """`down_proj` and `up_proj` swap their shapes, and layers of a model may differ in width."""
    base = tiny()
    wider = torch.nn.Linear(32, 80, bias=False, device=DEVICE)
    base.model.layers[1].mlp.up_proj, base.model.layers[1].mlp.gate_proj = (
        wider,
        torch.nn.Linear(32, 80, bias=False, device=DEVICE),
    )
    base.model.layers[1].mlp.down_proj = torch.nn.Linear(80, 32, bias=False, device=DEVICE)
    fields = {"num_groups": 1} if method == "msplora" else {}
    model = attached(method, base, target_modules=["up_proj", "down_proj"], **fields)
    kinds = {key.split(".")[-3 if method == "msplora" else -2] for key in model.encoder.tensors() if "shared" in key}
    assert kinds == {"32x64", "32x80", "64x32", "80x32"}
    model(tokens(5)[None])


@pytest.mark.parametrize(
    ("layers", "groups", "expected"), [(2, 2, [0, 1]), (5, 2, [0, 0, 0, 1, 1]), (4, 3, [0, 0, 1, 2])]
)
def test_msploras_groups_are_neighbouring_layers(layers, groups, expected):
    model = drawn("msplora", tiny(num_hidden_layers=layers), num_groups=groups)
    for module, part in model.encoder.targets:
        levels, layer = part.shared.of(part)
        x = torch.randn(3, part.own.A.shape[2], generator=torch.Generator().manual_seed(0)).to(DEVICE)
        assert_close(levels(x, layer), levels.all(x, 0) + levels.groups(x, expected[layer]))
        assert f".{layer}." in part.name
        assert module is model.base_model.get_submodule(part.name)


# -- BA-LoRA's regularisers --------------------------------------------------------------------------------------------


def test_ba_loras_loss_has_the_three_regularisers_by_hand():
    weights = {"consistency": 0.7, "diversity": 0.3, "low_rank": 0.9, "num_singular_values": 2}
    model = attached("ba-lora", tiny(), **weights)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(DEVICE) / 4)
    inputs = answers()
    plain = model(**inputs).loss
    model.encoders.train()
    model.training = True
    loss = model(**inputs).loss
    model.training = False
    model.encoders.eval()

    last, before = [], []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        prompt = ids[mask.bool() & ((labels != -100).long().cumsum(0) == 0)][None]
        last.append(array(model(prompt).logits[0, -1]))
        before.append(array(tiny()(prompt).logits[0, -1]))
    logits, before = np.stack(last), np.stack(before)
    p, p0 = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (logits, before))
    consistency = (p0 * np.log(p0 / p)).sum(1).mean()
    entropy = -(p * np.log(p)).sum(1).mean()
    values = np.linalg.svd(logits, compute_uv=False)
    expected = 0.7 * consistency - 0.3 * entropy - 0.9 * values[:2].sum() / values.sum()
    assert consistency > 1e-3
    assert (loss - plain).item() == pytest.approx(expected, rel=1e-3)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())


def test_ba_loras_loss_is_the_same_behind_any_padding():
    model = attached("ba-lora", tiny("opt"), consistency=1.0, diversity=1.0, low_rank=1.0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(1.5)
    rows = [tokens(6, 1), tokens(9, 2), tokens(4, 3)]
    model.encoders.train()
    model.training = True
    losses = []
    for lefts, width in (([0, 0, 0], 9), ([3, 0, 5], 9), ([2, 1, 4], 12)):
        ids, mask = batch(rows, lefts, width)
        ends = torch.tensor([left + len(row) for row, left in zip(rows, lefts, strict=True)], device=DEVICE)
        answer = torch.arange(width, device=DEVICE)[None] >= ends[:, None] - 2
        losses.append(model(ids, mask, torch.where(answer & mask.bool(), ids, -100)).loss)
    assert_close(torch.stack(losses), losses[0].expand(3), atol=1e-5, rtol=1e-5)


# -- what does not fit -------------------------------------------------------------------------------------------------

UNFIT = {
    "a rank that exceeds the matrix": ("nlora", {"rank": 17}, r"rank 17 exceeds min\(in, out\) = 16"),
    "an outer rank that does": ("nora", {"rank": 17}, r"rank 17 exceeds min\(in, out\) = 16"),
    "an inner rank that exceeds the outer": ("nora", {"inner_rank": 7}, "inner_rank 7 exceeds rank 6"),
    "factors that do": ("lotr", {"rank": 17}, r"rank 17 exceeds min\(in, out\) = 16"),
    "what all layers share does": ("msplora", {"rank": 17}, r"rank 17 exceeds min\(in, out\) = 16"),
    "more groups than layers": ("msplora", {"num_groups": 3}, "num_groups 3 exceeds the 2 layers"),
    "no divisor": ("compacter", {"phm_dim": 5}, "phm_dim 5 does not divide the 32 outputs"),
    "a rank that exceeds the block": ("compacter", {"rank": 4}, "rank 4 exceeds 3, that of a 3 × 8 block"),
    "no such module": ("compacter", {"target_modules": ["c_proj"]}, "no linear module 'c_proj'"),
    "a negative weight": ("ba-lora", {"diversity": -1.0}, "diversity=-1"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused_and_leaves_the_base_as_it_was(case):
    method, fields, message = UNFIT[case]
    base = tiny()
    before = base(tokens(5)[None]).logits
    with pytest.raises(PtmoeError, match=message):
        attached(method, base, **fields)
    assert torch.equal(base(tokens(5)[None]).logits, before)
    assert not any(module._forward_hooks for module in base.modules())


def test_ba_lora_is_refused_where_layers_take_inputs_beside_the_embeddings():
    base = tiny()
    base.config.hidden_size_per_layer_input = 8
    with pytest.raises(PtmoeError, match="LlamaForCausalLM take inputs beside them: take pissa"):
        METHODS["ba-lora"]().encoder_for(base)


def test_compacter_finds_the_projections_of_every_architecture():
    places = {
        "llama": {"o_proj", "down_proj"},
        "gpt2": {"attn.c_proj", "mlp.c_proj"},
        "opt": {"out_proj", "fc2"},
        "phi": {"self_attn.dense", "fc2"},
        "gpt_neox": {"attention.dense", "dense_4h_to_h"},
        "gemma2": {"o_proj", "down_proj"},
    }
    for architecture, names in places.items():
        model = attached("compacter", tiny(architecture))
        assert set(model.method_config.target_modules) == names
        assert len(model.encoder.parts) == 4
