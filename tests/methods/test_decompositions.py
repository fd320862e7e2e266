"""Methods that start from a decomposition of the weights: what each adds to a module, by the formula in numpy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig

import ptmoe
from ptmoe.methods import METHODS
from ptmoe.methods.bilora import in_first_part
from ptmoe.methods.parts import leading
from ptmoe.methods.sorsa import skew
from ptmoe.models.attach import attach, count_parameters, load_adapter
from testing.bases import DEVICE, LLAMA_1B, array, batch, tiny, tiny_llama, tokens
from testing.losses import answers

SIZES = {
    "lora-xs": {"rank": 3},
    "svfit": {"rank": 5},
    "soka": {"rank": 3},
    "edora": {"rank": 3},
    "goat": {"rank": 2, "num_experts": 3, "top_k": 2, "eta": 2.0, "rho": 5.0},
    "bilora": {"rank": 3, "alpha": 5},
}
BASES = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def attached(method, base=None, **fields):
    return attach(base or tiny_llama(), METHODS[method](**(SIZES.get(method, {}) | fields)), seed=1)


def drawn(model):
    """With every trained number drawn."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def weight(module):
    """`(out, in)`, in float64."""
    return array(module.weight) if isinstance(module, torch.nn.Linear) else array(module.weight).T


def svd(matrix):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def kronecker_svd(matrix, part):
    """The rearranged matrix block by block, and its factors as matrices."""
    (m, n), (p, q) = part.blocks, part.block
    rows = [matrix[i * p : (i + 1) * p, j * q : (j + 1) * q].ravel() for i in range(m) for j in range(n)]
    left, values, right = svd(np.array(rows))
    return left.T.reshape(-1, m, n), values, right.reshape(-1, p, q)


def expected(method, part, module, x):
    """The module's output `(L, out)`, without its bias, for `x (L, in)`."""
    W = weight(module)
    U, S, V = svd(W)
    if method == "lora-xs":
        R = len(part.M)
        return x @ (W + U[:, :R] @ signed(part, U) @ np.diag(S[:R]) @ V[:R]).T
    if method == "svfit":
        R = len(part.delta)
        return x @ (W + sum(d * np.outer(U[:, i], V[i]) for i, d in enumerate(array(part.delta[:R])))).T
    if method == "edora":
        R = len(part.M)
        direction = W + U[:, :R] @ signed(part, U) @ np.diag(S[:R]) @ V[:R]
        return x @ (array(part.magnitude) / np.linalg.norm(direction, axis=1) * direction.T)
    if method == "soka":
        C, values, D = kronecker_svd(W, part)
        for k in range(len(part.C)):
            W = W + np.kron(array(part.C[k]), array(part.D[k])) - values[k] * np.kron(C[k], D[k])
        return x @ W.T
    if method == "bilora":
        return x @ (W + 5 / 3 * array(part.P) @ np.diag(array(part.values)) @ array(part.Q)).T
    N, R, features = part.A.shape
    s, segment = np.sqrt(3 * 2.0 * features / R), min(W.shape) // N
    for i in range(N):
        own = slice(i * segment, i * segment + R)
        W = W - (U[:, own] * S[own]) @ V[own] / 5.0 / N
    rows = []
    for token in x:
        scores = array(part.router) @ token
        chosen = np.argsort(scores)[-2:]
        share = np.exp(scores[chosen] - scores[chosen].max())
        share = share / share.sum()
        mixed = sum(w * array(part.B[i]) @ array(part.A[i]) for w, i in zip(share, chosen, strict=True))
        rows.append((W + s * mixed) @ token)
    return np.array(rows)


def signed(part, U):
    """M for numpy's signs of the singular vectors."""
    signs = np.sign((array(part.B) * U[:, : len(part.M)]).sum(0))
    return signs[:, None] * array(part.M) * signs


@BASES
@pytest.mark.parametrize("method", SIZES)
def test_a_module_gives_what_the_formula_says(method, architecture):
    model = drawn(attached(method, tiny(architecture)))
    seen = {}
    for key in model.encoder.parts:
        module = model.base_model.get_submodule(key.replace("/", "."))
        module.register_forward_hook(lambda _, inputs, output, key=key: seen.update({key: (inputs[0], output)}))
    model(tokens(6)[None])
    for key, part in model.encoder.parts.items():
        x, given = (array(one[0]) for one in seen[key])
        module = model.base_model.get_submodule(key.replace("/", "."))
        bias = 0 if module.bias is None else array(module.bias)
        wanted = expected(method, part, module, x) + bias
        np.testing.assert_allclose(given, wanted, atol=2e-5 * np.abs(wanted).max())


# -- where they start --------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("method", ["lora-xs", "edora"])
def test_the_small_matrix_starts_next_to_zero_and_at_zero_it_is_the_base(method, architecture):
    model, base = attached(method, tiny(architecture), rank=16), tiny(architecture)(tokens(8)[None]).logits
    for part in model.encoder.parts.values():
        assert 0.8e-5 < float(part.M.detach().std()) < 1.25e-5
        with torch.no_grad():
            part.M.zero_()
    assert_close(model(tokens(8)[None]).logits, base, atol=1e-5, rtol=0)


@BASES
def test_goat_starts_at_the_base_where_all_experts_weigh_the_same(architecture):
    model = attached("goat", tiny(architecture), top_k=5)
    for part in model.encoder.parts.values():
        assert part.top_k == 3
        part.router.data.zero_()
    assert_close(model(tokens(8)[None]).logits, tiny(architecture)(tokens(8)[None]).logits, atol=1e-5, rtol=0)


def test_every_goat_expert_has_its_own_segment_of_the_spectrum():
    model = attached("goat")
    name, part = next(iter(model.encoder.parts.items()))
    U, S, V = svd(weight(model.base_model.get_submodule(name.replace("/", "."))))
    segment = min(len(U), V.shape[1]) // 3
    for i in range(3):
        own = slice(i * segment, i * segment + 2)
        product = part.scaling * array(part.B[i]) @ array(part.A[i])
        np.testing.assert_allclose(product, U[:, own] * S[own] @ V[own] / 5.0, atol=1e-5)


def test_a_token_goes_through_the_top_experts_of_goat_alone():
    part = next(iter(drawn(attached("goat")).encoder.parts.values()))
    weights = part.route(torch.randn(4, 7, part.A.shape[2], device=DEVICE))
    assert torch.equal((weights > 0).sum(-1), torch.full((4, 7), 2, device=DEVICE))
    assert_close(weights.sum(-1), torch.ones(4, 7, device=DEVICE))


UNREADABLE = {name: (name, SIZES[name]) for name in sorted(set(SIZES) - {"bilora"})}
UNREADABLE |= {"soka by energy": ("soka", {"rank": 2, "energy": 0.9}), "nlora": ("nlora", {"rank": 2})}


@pytest.mark.parametrize(("method", "fields"), UNREADABLE.values(), ids=UNREADABLE)
def test_weights_that_cannot_be_decomposed_are_refused_and_the_base_is_left_as_it_was(method, fields):
    base = tiny_llama()
    base.model.layers[1].self_attn.q_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ptmoe.PtmoeError, match="cannot read one that holds NaN or infinity"):
        attach(base, METHODS[method](**fields), check=False)
    base.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(ptmoe.PtmoeError, match="cannot read one that is offloaded: load the base without"):
        attach(base, METHODS[method](**fields), check=False)
    assert not any(module._forward_hooks for module in base.modules())


def test_another_weight_in_a_modules_place_is_decomposed_anew():
    base = tiny_llama()
    module = base.model.layers[0].self_attn.q_proj
    for other in (module.weight.detach() + 1, torch.ones_like(module.weight), module.weight.detach().bfloat16()):
        leading(module, 2)
        module.weight.data = other
        left, values, _ = leading(module, 1)
        assert_close(values[0], torch.linalg.matrix_norm(other.double(), 2).float())
        assert leading(module, 1)[0].data_ptr() == left.data_ptr()  # it is kept


# -- SORSA's regulariser -----------------------------------------------------------------------------------------------


def test_sorsa_adds_how_far_its_vectors_are_from_orthonormal_to_the_training_loss_alone():
    model = attached("sorsa", rank=3, gamma=0.5)
    expected = sum(
        np.linalg.norm((unit := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ unit.T - np.eye(3))
        for key, value in drawn(model).encoder.named_parameters()
        for rows in [array(value if "lora_A" in key else value.T)]
    )
    plain = model(**answers()).loss
    model.training = True
    model.encoders.train()
    added = model(**answers()).loss - plain
    assert float(added) == pytest.approx(0.5 * expected, rel=1e-4)


def test_lengths_are_no_matter_to_sorsas_regulariser():
    rows = torch.linalg.qr(torch.randn(8, 3))[0].T * torch.tensor([[3.0], [0.1], [1.0]])
    assert float(skew(rows)) < 1e-6
    assert float(skew(torch.ones(2, 8))) == pytest.approx(2**0.5)


# -- SoKA's rank -------------------------------------------------------------------------------------------------------


def test_soka_takes_the_rank_from_the_energy_or_the_elbow_of_each_spectrum(tmp_path):
    decided = set()
    for energy, most in ((0.1, 16), (0.3, 16), (1.0, 16), (1.0, 2)):
        base = tiny_llama()
        model = attached("soka", base, rank=most, energy=energy)
        ranks = []
        for key, part in model.encoder.parts.items():
            _, values, _ = kronecker_svd(weight(base.get_submodule(key.replace("/", "."))), part)
            enough = next(k for k in range(1, 33) if (values[:k] ** 2).sum() >= (energy - 1e-9) * (values**2).sum())
            elbow = 1 + int(np.argmax(np.linspace(values[0], values[-1], len(values)) - values))
            ranks.append(min(enough, elbow, most))
            decided.add([enough, elbow, most].index(ranks[-1]))
        assert model.method_config.ranks == ranks
        assert count_parameters(base.config, model.method_config) == model.num_parameters(only_trainable=True)
    assert decided == {0, 1, 2}
    drawn(model).save_pretrained(tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    assert again.method_config == model.method_config
    assert torch.equal(again(tokens(8)[None]).logits, model(tokens(8)[None]).logits)


def test_ranks_by_energy_cannot_be_counted_without_weights_and_are_one_for_each_module():
    base = tiny_llama()
    with pytest.raises(ptmoe.PtmoeError, match="no weights are here: leave energy out where parameters are counted"):
        count_parameters(base.config, METHODS["soka"](energy=0.5))
    with pytest.raises(ptmoe.PtmoeError, match=r"a rank for each of 4 modules.* ranks has 1"):
        attached("soka", base, energy=0.5, ranks=[1])
    attach(base, METHODS["lora"]())  # it is as it was


# -- BiLoRA's two parts of the data ------------------------------------------------------------------------------------


def gradients(model, rows, divisor=40):
    """Of the loss of some rows, `(prompt, completion)` each."""
    model.train().zero_grad()
    model.base_model.eval()  # without dropout
    ids, mask = batch([torch.cat(row) for row in rows], [0] * len(rows))
    labels = torch.full_like(ids, -100)
    for i, (prompt, completion) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(completion)] = completion
    loss = model(ids, mask, labels=labels, num_items_in_batch=divisor).loss
    loss.backward()
    return {name: one.grad.clone() for name, one in model.encoder.named_parameters()}, loss.detach()


ROWS = [(tokens(3 + i % 4, i), tokens(2 + i % 3, 100 + i)) for i in range(12)]


def first_part(model, rows):
    ids, mask = batch([prompt for prompt, _ in rows], [0] * len(rows))
    return in_first_part(model.base_model.get_input_embeddings()(ids), mask.bool()).tolist()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_rows_of_the_first_part_train_bilorass_vectors_and_the_others_its_values(architecture):
    model = drawn(attached("bilora", tiny(architecture), gamma=0.0))
    parts = first_part(model, ROWS)
    assert 2 < sum(parts) < 10
    together, loss = gradients(model, ROWS)
    alone = {bit: gradients(model, [row for row, one in zip(ROWS, parts, strict=True) if one == bit]) for bit in parts}
    assert_close(loss, alone[True][1] + alone[False][1])
    for name, gradient in together.items():
        values = name.endswith("values")
        assert_close(gradient, alone[not values][0][name], atol=1e-6, rtol=1e-4)
        assert gradient.any()
        assert not alone[values][0][name].any()


def test_the_part_of_a_row_is_that_of_its_prompt_whatever_stands_beside_it():
    model = attached("bilora")
    expected = first_part(model, ROWS)
    embed = model.base_model.get_input_embeddings()
    for i, (prompt, completion) in enumerate(ROWS):
        for before, after in ((0, completion), (3, completion.flip(0))):
            ids, _ = batch([torch.cat([prompt, after]), tokens(9, 50 + i)], [before, 0], 16)
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask[0, before : before + len(prompt)] = mask[1, :4] = True
            assert in_first_part(embed(ids), mask)[0] == expected[i]
    prompts = [(tokens(6, seed), None) for seed in range(400)]
    for base in (model, attached("bilora", tiny_llama().to(torch.bfloat16))):
        assert 150 < sum(first_part(base, prompts)) < 250


def test_biloras_regulariser_pulls_its_vectors_to_orthonormal_ones():
    model = attached("bilora", gamma=0.3)
    penalties = [part.penalty() for part in model.encoder.parts.values()]
    assert_close(torch.stack(penalties), torch.zeros(4, device=DEVICE), atol=1e-9, rtol=0)
    for part in drawn(model).encoder.parts.values():
        P, Q = array(part.P), array(part.Q)
        wanted = 0.3 * (((P.T @ P - np.eye(3)) ** 2).sum() + ((Q @ Q.T - np.eye(3)) ** 2).sum())
        assert float(part.penalty()) == pytest.approx(wanted, rel=1e-5)


def test_what_would_mix_biloras_rows_is_not_done_and_the_base_keeps_its_fast_paths():
    model = drawn(attached("bilora"))
    gradients(model, ROWS)
    paths = model.fast_paths()
    assert paths["packing"] == paths["last_layer"] == "rows of a batch train different parameters"
    model.packing = True
    with pytest.raises(ptmoe.PtmoeError, match="bilora cannot be packed: rows of a batch train different"):
        gradients(model, ROWS)
    with model.disable_adapter():
        assert model.fast_paths()["packing"] is model.fast_paths()["last_layer"] is None


# -- sizes -------------------------------------------------------------------------------------------------------------

IN, OUT = 2048, (2048, 512)  # of the 16 query and value projections
COUNTS = {
    "lora-xs": lambda R: 2 * R**2,
    "svfit": lambda R: 2 * R,
    "sorsa": lambda R: sum(R * (IN + out) for out in OUT),
    "soka": lambda R: R * (32 * 64 + 64 * 32) + R * (16 * 64 + 32 * 32),
    "edora": lambda R: sum(R**2 + out for out in OUT),
    "goat": lambda R: sum(8 * R * (IN + out) + 8 * IN for out in OUT),
    "bilora": lambda R: sum(R * (IN + out + 1) for out in OUT),
}


@pytest.mark.parametrize("method", COUNTS)
@pytest.mark.parametrize("rank", [1, 7])
def test_the_count_is_the_formula(method, rank):
    assert count_parameters(LLAMA_1B, METHODS[method](rank=rank)) == 16 * COUNTS[method](rank)


def test_lora_xs_has_its_papers_numbers():
    # The paper: 60k on RoBERTa-large at rank 25, four modules in each of 24 layers; 3.67M on LLaMA3-8B at rank 128,
    # seven in each of 32. The count is the same at any width.
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    for layers, names, rank, count in ((24, modules[:4], 25, 60_000), (32, modules, 128, 3_670_016)):
        config = METHODS["lora-xs"](rank=rank, target_modules=names)
        assert count_parameters(LlamaConfig(num_hidden_layers=layers, **sizes), config) == count


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        *(
            (method, {"rank": 17}, r"rank 17 exceeds min\(in, out\) = 16")
            for method in ("lora-xs", "svfit", "edora", "bilora", "pissa", "sorsa", "ba-lora")
        ),
        ("soka", {"rank": 33}, "rank 33 exceeds the 32 Kronecker products of a 32 × 32 module"),
        ("goat", {"rank": 3, "num_experts": 6}, r"num_experts 6 × rank 3 exceeds min\(in, out\) = 16 of a 32 × 16"),
    ],
)
def test_a_size_that_exceeds_the_matrix_is_refused_and_leaves_the_base_as_it_was(method, fields, message):
    base = tiny_llama()
    for meet in (lambda config: attach(base, config), lambda config: count_parameters(base.config, config)):
        with pytest.raises(ptmoe.PtmoeError, match=message):
            meet(METHODS[method](**fields))
    assert not any(module._forward_hooks for module in base.modules())
    attach(base, METHODS["lora"]())
