"""The model's forward pass: padding changes nothing, the answer changes no routing, the base changes by no bit."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS, PTConfig, PTMoEConfig
from ptmoe.models.attach import attach
from ptmoe.models.causal import PromptedCausalLM, readable_tokens
from ptmoe.train.data import collate
from testing.architectures import HIDDEN, POSITIONS
from testing.bases import (
    BY_ROW,
    CONFIGS,
    DEVICE,
    PT_MOE,
    SELECTIVE_PROBATIONARY,
    array,
    batch,
    on_device,
    own_projection,
    prompted,
    tiny,
    tiny_llama,
    tokens,
)
from testing.losses import checkpointed_gradients

every_base = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
all_methods = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
all_gates = pytest.mark.parametrize("config", SELECTIVE_PROBATIONARY.values(), ids=SELECTIVE_PROBATIONARY)
readers = pytest.mark.parametrize(
    "config", [config for config in CONFIGS.values() if config.reads_input], ids=lambda config: config.method
)
left_padding = st.integers(0, 4)
ROWS = st.lists(st.tuples(st.integers(1, 9), left_padding), min_size=1, max_size=4)


def supervised(prompts, answers, lefts, width=None):
    """A batch of prompts with their answers, and the labels of the answers."""
    rows = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    ids, mask = batch(rows, lefts, width)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer, left) in enumerate(zip(prompts, answers, lefts, strict=True)):
        labels[i, left + len(prompt) : left + len(prompt) + len(answer)] = answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


MIXED = supervised(  # no padding, both sides, left, right
    [tokens(5, 1), tokens(3, 2), tokens(4, 3), tokens(1, 4)],
    [tokens(4, 5), tokens(2, 6), tokens(1, 7), tokens(3, 8)],
    [0, 2, 4, 0],
)


# -- an independent formula --------------------------------------------------------------------------------------------


def softmax(values):
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def own_gate(probabilities, config):
    kept = np.ones_like(probabilities)
    if config.selective:
        kept = np.zeros_like(probabilities)
        kept[np.argmax(probabilities)] = 1
    return kept * probabilities if config.probationary else kept


def own_prompt(model, embeds):
    """The prompt `(T, H)` of one input's embeddings `(n, H)`, in float64 and straight from the papers' formulas."""
    config = model.method_config
    tensor = {key: array(value) for key, value in model.encoder.state_dict().items()}
    x = array(embeds)
    if config.method == "pt":
        return tensor["prompt"]
    if config.method == "dpt":
        return tensor["A"] @ tensor["B"]
    if config.method == "ulpt":
        low = tensor["Z"] @ own_projection(config.rank, len(x[0]), config.projection_seed)
        return low * tensor["scale"] + tensor["shift"]
    if config.method == "id-spam":
        query, key, value = (x @ tensor[name].T for name in ("query", "key", "value"))
        scores = query @ key.T / np.sqrt(config.attention_size)
        mean = np.mean([softmax(row) @ value for row in scores], axis=0)
        hidden = np.maximum(tensor["down"] @ mean + tensor["down_bias"], 0)
        return tensor["prompt"] + tensor["up"] @ hidden
    if config.method == "ept":
        knowledge, fused = tensor["A"] @ tensor["B"], []
        for short in tensor["prompt"]:
            token = short + softmax(knowledge @ short / np.sqrt(len(short))) @ knowledge
            spaces = [token @ down @ up for down, up in zip(tensor["down"], tensor["up"], strict=True)]
            fused.append(token + softmax(tensor["gate"] @ token) @ np.array(spaces))
        return np.array(fused)
    if config.method == "smop":
        p = softmax(tensor["router.weight"] @ x.mean(0))
        return p.max() * tensor["prompts"][p.argmax()]
    if config.method == "attempt":
        hidden = tensor["down"] @ x.max(0)
        hidden = tensor["up"] @ (hidden / (1 + np.exp(-hidden)))
        query = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        prompts = [*tensor["source_prompts"], tensor["prompt"]]
        weights = softmax(np.array([prompt.max(0) @ query for prompt in prompts]) / (np.e * len(query)))
        return tensor["prompt"] + sum(weight * prompt for weight, prompt in zip(weights, prompts, strict=True))
    g = own_gate(softmax(tensor["router.weight"] @ x.mean(0) + tensor["router.bias"]), config)
    mixed = sum(weight * expert for weight, expert in zip(g, tensor["A"], strict=True))
    if config.frozen_projection:
        low = mixed @ own_projection(config.rank, len(x[0]), config.projection_seed)
        return low * tensor["scale"] + tensor["shift"]
    return mixed @ tensor["B"]


def own_logits(model, ids, readable=None):
    """`(T + n, V)` of one unpadded row `ids (n,)` whose router reads the first `readable` tokens, by hand."""
    embeds = model.base_model.get_input_embeddings()(ids)
    prompt = torch.from_numpy(own_prompt(model, embeds[:readable])).to(embeds)
    spliced = torch.cat([prompt, embeds])[None]
    positions = torch.arange(spliced.shape[1], device=DEVICE)[None]
    return model.base_model(inputs_embeds=spliced, position_ids=positions).logits[0]


def own_loss(model, inputs):
    """The mean cross-entropy over all supervised tokens of a batch, row by row and token by token."""
    losses = []
    virtual = model.method_config.num_virtual_tokens
    for row, mask, targets in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        ids, labels = row[mask == 1], targets[mask == 1]
        places = [place for place, label in enumerate(labels) if label != -100]
        logits = own_logits(model, ids, readable=places[0]).double()
        losses += [logits[virtual + j - 1].logsumexp(0) - logits[virtual + j - 1, labels[j]] for j in places]
    return torch.stack(losses).mean()


@all_methods
def test_the_logits_are_those_of_the_formula_spliced_by_hand(base, config):
    model = prompted(base, config)
    rows, lefts = [tokens(6, 1), tokens(3, 2), tokens(8, 3)], [1, 4, 0]
    ids, mask = batch(rows, lefts, 10)
    logits = model(ids, mask).logits
    for i, (row, left) in enumerate(zip(rows, lefts, strict=True)):
        expected = own_logits(model, row)[config.num_virtual_tokens :]
        assert_close(logits[i, left : left + len(row)], expected, atol=1e-5, rtol=0)


# -- padding -----------------------------------------------------------------------------------------------------------


@all_methods
@every_base
@given(rows=ROWS, extra=st.integers(0, 3))
def test_padding_on_any_side_gives_each_row_the_logits_it_gets_alone(base, config, rows, extra):
    model = prompted(base, config)
    inputs, lefts = [tokens(length, i) for i, (length, _) in enumerate(rows)], [left for _, left in rows]
    ids, mask = batch(inputs, lefts, max(length + left for length, left in rows) + extra)
    logits = model(ids, mask).logits
    assert logits.shape[:2] == ids.shape
    for i, (row, left) in enumerate(zip(inputs, lefts, strict=True)):
        assert_close(logits[i, left : left + len(row)], model(row[None]).logits[0], atol=1e-5, rtol=0)


def test_what_stands_at_padding_changes_no_bit(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    ids, mask, labels = MIXED.values()
    other = torch.where(mask == 1, ids, 57)
    out, again = model(ids, mask, labels), model(other, mask, labels)
    real = mask == 1
    assert torch.equal(out.logits[real], again.logits[real])
    assert torch.equal(out.routing.gate, again.routing.gate)
    assert torch.equal(out.loss, again.loss)


def test_labels_at_padding_count_for_nothing(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    labels = torch.where(MIXED["attention_mask"] == 1, MIXED["labels"], 5)
    assert torch.equal(model(**MIXED).loss, model(**(MIXED | {"labels": labels})).loss)


def test_labels_at_padding_that_have_been_counted_are_refused():
    """`Trainer` counts them, and a loss of the real ones alone would be divided by too many."""
    model = prompted(tiny_llama(), CONFIGS["PT"])
    labels = torch.where(MIXED["attention_mask"] == 1, MIXED["labels"], 5)
    with pytest.raises(PtmoeError, match="labels at padding"):
        model(**(MIXED | {"labels": labels}), num_items_in_batch=20)
    model(**MIXED, num_items_in_batch=20)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", ["pt", "pt-moe", "lora"])
def test_a_gap_in_the_mask_is_as_if_its_tokens_were_not_there(method, packing):
    """What follows a gap is predicted by the last token before it, packed or not."""
    model = attach(tiny_llama(), METHODS[method](**({"rank": 2} if method == "pt-moe" else {}))).train()
    model.packing = packing
    row, labels = MIXED["input_ids"][:1], MIXED["labels"][:1]
    gap = torch.zeros_like(row)  # one within the prompt, one right before the answer, one within it
    first = int((labels != -100).int().argmax())
    gap[:, [1, first - 1, first + 1]] = 1
    mask, targets = MIXED["attention_mask"][:1] * (1 - gap), labels.masked_fill(gap == 1, -100)
    kept = mask[0] == 1
    inputs = {"input_ids": row, "attention_mask": mask, "labels": targets}
    torch.manual_seed(0)
    found = model(**inputs).loss
    torch.manual_seed(0)
    expected = model(row[:, kept], labels=targets[:, kept]).loss
    assert_close(found, expected, atol=1e-5, rtol=0)
    assert_close(model.eval()(**inputs).loss, model(row[:, kept], labels=targets[:, kept]).loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["pt", "lora", "prefix-tuning"])
def test_trainer_counts_the_tokens_that_are_predicted(method, tmp_path):
    """Where every token is supervised, the first one of a row is predicted behind virtual tokens alone."""
    model = attach(tiny_llama(), METHODS[method]())
    ids = torch.stack([tokens(6, seed) for seed in range(4)])
    batch = {"input_ids": ids, "labels": ids.clone()}
    arguments = TrainingArguments(str(tmp_path), report_to="none", per_device_train_batch_size=4)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    _, count = trainer.get_batch_samples(iter([batch]), 1, model.device)
    assert_close(model(**batch, num_items_in_batch=count).loss, model(**batch).loss)


# -- the answer and the routing ----------------------------------------------------------------------------------------


@all_gates
@given(data=st.data())
def test_neither_the_answer_nor_the_padding_changes_the_routing_by_one_bit(config, data):
    model = prompted(tiny_llama(), config)
    prompts = [tokens(length, length) for length in (1, 6, 9)]
    seen = []
    for _ in range(2):
        answers = [tokens(data.draw(st.integers(1, 7)), data.draw(st.integers(0, 99))) for _ in prompts]
        lefts = [data.draw(left_padding) for _ in prompts]
        seen.append(model(**supervised(prompts, answers, lefts, 20 + data.draw(st.integers(0, 3)))).routing)
    assert torch.equal(seen[0].gate, seen[1].gate)
    assert torch.equal(seen[0].probabilities, seen[1].probabilities)


def test_training_routes_as_generation_does(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    prompts = [tokens(5, 1), tokens(3, 2), tokens(4, 3)]
    in_training = model(**supervised(prompts, [tokens(3, 4)] * 3, [0, 1, 2])).routing
    in_generation = model.route(*batch(prompts, [2, 0, 1]))
    assert torch.equal(in_training.gate, in_generation.gate)
    assert torch.equal(in_training.probabilities, in_generation.probabilities)


@readers
@given(data=st.data())
def test_a_prompt_depends_on_neither_the_answer_nor_the_padding(config, data):
    model = prompted(tiny_llama(), config)
    inputs = [tokens(length, length) for length in (1, 6, 9)]
    answers = [tokens(data.draw(st.integers(1, 7)), data.draw(st.integers(0, 99))) for _ in inputs]
    batch_of = supervised(inputs, answers, [data.draw(left_padding) for _ in inputs], 20)
    readable = readable_tokens(batch_of["attention_mask"], batch_of["labels"])
    together = model.compose(batch_of["input_ids"], batch_of["attention_mask"], readable)[1].embeds
    for row, prompt in zip(inputs, together, strict=True):
        assert_close(prompt, model.compose(row[None])[1].embeds[0], atol=1e-5, rtol=1e-5)


def test_inputs_are_routed_differently():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"])
    routing = model.route(torch.stack([tokens(6, i) for i in range(30)]))
    assert set(routing.probabilities.argmax(1).tolist()) == {0, 1, 2}


def test_input_mask_names_the_tokens_that_the_router_reads():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"])
    ids, mask, labels = supervised([tokens(4), tokens(2)], [tokens(3), tokens(5)], [0, 1]).values()
    readable = torch.zeros_like(mask)
    readable[0, :4] = readable[1, 1:3] = 1
    scored, trained = model(ids, mask, input_mask=readable), model(ids, mask, labels)
    assert torch.equal(scored.routing.gate, trained.routing.gate)
    assert torch.equal(scored.logits, trained.logits)
    assert not torch.equal(scored.routing.gate, model(ids, mask).routing.gate)


def test_padding_in_input_mask_is_not_read():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"])
    ids, mask = batch([tokens(4), tokens(2)], [1, 3])
    everywhere = torch.ones_like(mask)
    assert torch.equal(model(ids, mask, input_mask=everywhere).routing.gate, model(ids, mask).routing.gate)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@readers
def test_the_loss_is_the_cross_entropy_of_the_hand_spliced_logits(base, config, training):
    model = prompted(base, config.replace(router_noise=0) if hasattr(config, "router_noise") else config)
    expected = own_loss(model, MIXED)
    model.encoders.train(training)
    model.training = training  # the base stays without dropout
    out = model(**MIXED)
    assert (out.logits is None) == training
    assert_close(out.loss.double(), expected.double(), atol=1e-5, rtol=0)


def test_skipping_logits_changes_neither_the_loss_nor_a_gradient_under_dropout(base):
    model = prompted(base, CONFIGS["PT-MoE probationary"]).train()
    model.packing = False  # dropout draws a number for each position, padding included
    results = []
    for skip_logits in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        out = model(**MIXED, skip_logits=skip_logits)
        out.loss.backward()
        results.append([out.loss.detach(), *(parameter.grad for parameter in model.encoder.parameters())])
    assert_close(*results, atol=1e-6, rtol=1e-4)


def test_training_projects_to_the_vocabulary_at_supervised_positions_only(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    rows = []
    model.train()(**MIXED)  # the first call tries the base out
    model.get_output_embeddings().register_forward_hook(lambda *arguments: rows.append(arguments[2][..., 0].numel()))
    model.train()(**MIXED)
    model.eval()(**MIXED)
    batch_size, length = MIXED["input_ids"].shape
    assert rows == [4 + 2 + 1 + 3, batch_size * (PT_MOE["num_virtual_tokens"] + length)]


def test_micro_batches_add_up_to_the_loss_and_gradients_of_the_batch(base):
    model = prompted(base, CONFIGS["PT-MoE selective"].replace(router_noise=0))
    model.training = True
    whole = model(**MIXED)
    whole.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.encoder.parameters()]
    model.zero_grad()
    count = (MIXED["labels"] != -100).sum()
    losses = []
    for rows in ([0], [1, 2], [3]):
        part = {key: value[rows] for key, value in MIXED.items()}
        losses.append(model(**part, num_items_in_batch=count).loss)
        losses[-1].backward()
    assert_close(sum(losses), whole.loss, atol=1e-6, rtol=1e-6)
    assert_close([parameter.grad for parameter in model.encoder.parameters()], gradients, atol=1e-5, rtol=1e-4)


def test_a_batch_without_supervised_tokens_has_loss_zero():
    model = prompted(tiny_llama(), CONFIGS["PT"]).train()
    loss = model(tokens(4)[None], labels=torch.full((1, 4), -100, device=DEVICE)).loss
    loss.backward()
    assert loss == 0
    assert not model.encoder.prompt.grad.any()
    assert model.eval()(tokens(4)[None], labels=torch.full((1, 4), -100, device=DEVICE)).loss == 0


@pytest.mark.parametrize("method", ["pt-moe", "sorsa"])
@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_a_step_without_supervised_tokens_has_loss_zero_and_leaves_the_weights_finite(method, count):
    """`Trainer` counts none where each example of a step was cut before its answer."""
    model = attach(tiny_llama(), METHODS[method](rank=2)).train()
    labels = torch.full((2, 4), -100, device=DEVICE)
    loss = model(torch.stack([tokens(4, 1), tokens(4, 2)]), labels=labels, num_items_in_batch=count).loss
    loss.backward()
    assert loss == 0
    gradients = [parameter.grad for parameter in model.encoder.parameters() if parameter.grad is not None]
    assert not any(gradient.any() for gradient in gradients)


def test_the_first_token_can_be_supervised_where_nothing_is_routed():
    model = prompted(tiny_llama(), CONFIGS["PT"])
    ids = tokens(4)
    expected = torch.nn.functional.cross_entropy(own_logits(model, ids)[4:-1], ids)
    assert_close(model(ids[None], labels=ids[None]).loss, expected, atol=1e-6, rtol=0)


# -- gradients ---------------------------------------------------------------------------------------------------------


@all_methods
def test_gradients_reach_every_part_of_the_adapter_and_nothing_of_the_base(base, config):
    model = prompted(base, config).train()
    model(**MIXED).loss.backward()
    without = set()
    if config.method == "pt-moe" and not config.selective and not config.probationary:
        without = {"router.weight", "router.bias"}  # every expert counts one, whatever the router says
    for key, parameter in model.encoder.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (key not in without), key
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


def test_training_changes_the_base_by_no_bit_and_the_adapter_everywhere(base):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = attach(base, PTMoEConfig(**PT_MOE)).train()
    base.eval()  # dropout may hide in a loss what so few steps learn
    started = [parameter.detach().clone() for parameter in model.encoder.parameters()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(**MIXED).loss)
        losses[-1].backward()
        optimizer.step()
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all((old != new).any() for old, new in zip(started, model.encoder.parameters(), strict=True))
    assert losses[-1] < losses[0]


def test_selective_without_probationary_trains_the_router_straight_through():
    """The router's gradient is that of the soft gate, taken at the prompt of the hard one."""
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective"])
    ids, answer = tokens(5), tokens(3, 9)
    inputs = supervised([ids], [answer], [0])
    model(**inputs).loss.backward()

    a, b = model.encoder.A.detach(), model.encoder.B.detach()
    p = model.route(ids[None]).probabilities[0]
    prompt = (a[p.argmax()] @ b).requires_grad_()
    embeds = model.get_input_embeddings()(torch.cat([ids, answer]))
    logits = model.base_model(inputs_embeds=torch.cat([prompt, embeds])[None]).logits[0]
    torch.nn.functional.cross_entropy(logits[len(a[0]) + len(ids) - 1 : -1], answer).backward()
    of_gate = torch.einsum("th,nth->n", prompt.grad, a @ b)
    of_logits = p * (of_gate - p @ of_gate)
    mean = model.get_input_embeddings()(ids).mean(0)
    assert of_logits.abs().max() > 1e-6
    assert_close(model.encoder.router.bias.grad, of_logits, atol=1e-6, rtol=1e-4)
    assert_close(model.encoder.router.weight.grad, torch.outer(of_logits, mean), atol=1e-6, rtol=1e-4)


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_the_adapter_and_its_routing_stay_float32_on_a_bfloat16_base(base, autocast):
    model = prompted(base.to(torch.bfloat16), CONFIGS["PT-MoE selective probationary"]).train()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        out = model(**MIXED)
        logits = model.eval()(MIXED["input_ids"], MIXED["attention_mask"]).logits
    out.loss.backward()
    assert {parameter.dtype for parameter in model.encoder.parameters()} == {torch.float32}
    assert out.routing.gate.dtype == out.routing.probabilities.dtype == out.loss.dtype == torch.float32
    assert out.loss.isfinite()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.encoder.parameters())


def test_autocast_leaves_the_routing_of_a_float32_base_alone(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    plain = model(**MIXED).routing
    with torch.autocast(DEVICE.type, torch.bfloat16):
        mixed = model(**MIXED).routing
    assert torch.equal(plain.gate, mixed.gate)


def test_routing_on_a_bfloat16_base_is_computed_in_float32():
    model = prompted(tiny_llama().to(torch.bfloat16), CONFIGS["PT-MoE probationary"])
    ids = tokens(9)
    x = model.get_input_embeddings()(ids).double().mean(0)
    router = model.encoder.router
    expected = (router.weight.double() @ x + router.bias.double()).softmax(0)
    assert_close(model.route(ids[None]).probabilities[0].double(), expected, atol=1e-6, rtol=0)


# -- several adapters --------------------------------------------------------------------------------------------------


def with_several_adapters(base) -> PromptedCausalLM:
    model = prompted(base, CONFIGS["PT-MoE selective probationary"], name="moe")
    model = prompted(model, CONFIGS["PT"], seed=2, name="pt")
    for index, config in enumerate(BY_ROW.values()):
        model = prompted(model, config, seed=4 + index, name=f"rows {index}")
        model = prompted(model, config.replace(num_virtual_tokens=4, num_experts=2), seed=5 + index, name="others")
    return prompted(model, CONFIGS["DPT"].replace(num_virtual_tokens=3), seed=3, name="dpt")


NAMES = ["pt", "moe", "__base__", "rows 0", "dpt", "others"]
ROWS_OF_SIX = [tokens(length, length) for length in (4, 2, 7, 1, 5, 3)]
LEFTS_OF_SIX = [0, 4, 0, 2, 1, 4]


def alone(model, row, name):
    if name == "__base__":
        return model.base_model(row[None])
    model.set_adapter(name)
    return model(row[None])


def test_each_row_gets_the_adapter_it_names_and_what_it_gets_alone(base):
    model = with_several_adapters(base)
    ids, mask = batch(ROWS_OF_SIX, LEFTS_OF_SIX, 9)
    logits = model(ids, mask, adapter_names=NAMES).logits
    for i, (row, left, name) in enumerate(zip(ROWS_OF_SIX, LEFTS_OF_SIX, NAMES, strict=True)):
        assert_close(logits[i, left : left + len(row)], alone(model, row, name).logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_several_adapters_is_that_of_each_row_alone(base, training):
    model = with_several_adapters(base)
    prompts, answers = ROWS_OF_SIX, [tokens(2 + i % 3, i) for i in range(6)]
    inputs = supervised(prompts, answers, LEFTS_OF_SIX)
    inputs["labels"][2, :7] = ROWS_OF_SIX[2]  # a base row supervised from its first token, which nothing predicts
    model.training = training
    loss = model(**inputs, adapter_names=NAMES, num_items_in_batch=1).loss
    expected = 0.0
    for i, name in enumerate(NAMES):
        ids, labels = torch.cat([prompts[i], answers[i]]), inputs["labels"][i][inputs["attention_mask"][i] == 1]
        if name == "__base__":
            logits = model.base_model(ids[None]).logits[0]
            expected += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        else:
            model.set_adapter(name)
            expected += model(ids[None], labels=labels[None], num_items_in_batch=1).loss
    assert_close(loss, expected, atol=1e-4, rtol=1e-5)


def test_gradients_reach_each_rows_own_adapter(base):
    model = with_several_adapters(base)
    for encoder in model.encoders.values():
        encoder.requires_grad_(True)
    ids, mask, labels = MIXED.values()
    model(ids, mask, labels, adapter_names=["pt", "__base__", "moe", "others"]).loss.backward()
    assert model.encoders["pt"].prompt.grad.any()
    assert model.encoders["others"].R.grad.any()
    assert model.encoders["moe"].A.grad.any()
    assert model.encoders["dpt"].A.grad is model.encoders["rows 0"].R.grad is None


def test_set_adapter_chooses_what_is_used_and_what_trains():
    model = with_several_adapters(tiny_llama())
    ids = tokens(5)[None]
    assert model.active_adapter == "dpt"
    model.set_adapter("pt")
    assert torch.equal(model(ids).logits, model(ids, adapter_names=["pt"]).logits)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["encoders.pt.prompt"]


def test_disable_adapter_gives_the_untouched_base_and_ends(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    ids = torch.stack([tokens(6, 1), tokens(6, 2)])
    prompted_logits = model(ids).logits
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        out = model(ids, labels=ids)
        assert torch.equal(out.logits, base(ids).logits)
        for names in (["default"] * 2, ["default", "__base__"]):
            assert torch.equal(model(ids, adapter_names=names, num_items_in_batch=1).logits, out.logits)
        assert_close(out.loss, base(ids, labels=ids).loss)
        assert torch.equal(
            model.generate(ids, max_new_tokens=3),
            base.generate(ids, max_new_tokens=3, attention_mask=torch.ones_like(ids)),
        )
    assert torch.equal(model(ids).logits, prompted_logits)


def test_a_deleted_adapter_is_gone_and_the_active_one_cannot_be_deleted():
    model = with_several_adapters(tiny_llama())
    model.delete_adapter("pt")
    assert set(model.encoders) == set(NAMES) - {"pt", "__base__"}
    with pytest.raises(PtmoeError, match="no adapter 'pt'"):
        model.set_adapter("pt")
    with pytest.raises(PtmoeError, match="'dpt' is active"):
        model.delete_adapter("dpt")


def test_an_adapter_name_that_cannot_be_used_is_refused():
    model = prompted(tiny_llama(), CONFIGS["PT"])
    for name in ["", "a.b", "__base__", "default", 3, *dir(torch.nn.ModuleDict())]:
        with pytest.raises(PtmoeError, match="adapter"):
            attach(model, CONFIGS["PT"], adapter_name=name)


def test_a_wrong_adapter_name_is_answered_with_the_nearest():
    model = with_several_adapters(tiny_llama())
    ids = tokens(4)[None]
    for call in (
        lambda: model.set_adapter("mor"),
        lambda: model.delete_adapter("mor"),
        lambda: model(ids, adapter_names=["mor"]),
        lambda: model.generate(ids, adapter_names=["mor"]),
    ):
        with pytest.raises(PtmoeError, match="no adapter 'mor'; did you mean 'moe'"):
            call()
    with pytest.raises(PtmoeError, match="2 names for 1 rows"):
        model(ids, adapter_names=["moe", "pt"])


@pytest.mark.parametrize("training", [False, True])
def test_the_loss_comes_first_and_a_tuple_is_given_where_one_is_asked_for(training):
    model, ids = prompted(tiny_llama(), CONFIGS["PT"]).train(training), tokens(6)[None]
    out = model(ids, labels=ids, skip_logits=False, output_hidden_states=True)
    assert list(out) == ["loss", "logits", "hidden_states"]
    assert torch.equal(out[0], out.loss)
    assert torch.equal(model(ids, labels=ids)[0], out.loss)
    loss, logits, hidden = model(ids, labels=ids, skip_logits=False, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert len(hidden) == len(out.hidden_states)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["attention_mask", "input_mask", "labels"])
@pytest.mark.parametrize("shape", [(2, 7), (1, 6), (2, 1), (6,)])
def test_shapes_that_do_not_agree_are_named(argument, shape):
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"])
    ids = torch.stack([tokens(6, 1), tokens(6, 2)])
    inputs = {"input_ids": ids, "labels": torch.where(torch.arange(6, device=DEVICE) > 3, ids, -100)}
    with pytest.raises(PtmoeError, match=rf"{argument} has shape \({', ?'.join(map(str, shape))},?\)"):
        model(**(inputs | {argument: torch.ones(shape, dtype=torch.long, device=DEVICE)}))


def test_input_ids_without_a_batch_are_refused():
    model = prompted(tiny_llama(), CONFIGS["PT"])
    with pytest.raises(PtmoeError, match=r"input_ids has shape \(6,\)"):
        model(tokens(6))
    with pytest.raises(PtmoeError, match=r"input_ids has shape \(6,\)"):
        model.generate(tokens(6))


def test_an_input_fits_if_its_virtual_tokens_do_too(base):
    model = prompted(base, CONFIGS["PT"])
    virtual = CONFIGS["PT"].num_virtual_tokens
    longest = tokens(POSITIONS - virtual)
    ids, mask = batch([longest, tokens(3)], [9, 0], POSITIONS + 11)  # padding takes no position
    assert model(ids, mask).logits.isfinite().all()
    with pytest.raises(PtmoeError, match=f"60 tokens with {virtual} virtual tokens exceeds .* {POSITIONS} positions"):
        model(tokens(POSITIONS - virtual + 1)[None])
    with pytest.raises(PtmoeError, match="3 new ones exceeds"):
        model.generate(tokens(POSITIONS - virtual - 2)[None], max_new_tokens=3)
    assert model.generate(tokens(POSITIONS - virtual - 3)[None], max_new_tokens=3).shape[1] == POSITIONS - virtual


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "past_key_values"])
def test_what_the_splice_decides_cannot_be_passed(name):
    model = prompted(tiny_llama(), CONFIGS["PT"])
    with pytest.raises(PtmoeError, match=f"takes no {name}"):
        model(tokens(4)[None], **{name: torch.zeros(1, 4)})
    ids = tokens(4)[None]
    assert torch.equal(model(ids, **{name: None}).logits, model(ids).logits)
    options = {"max_new_tokens": 2}
    assert torch.equal(model.generate(ids, **{name: None}, **options), model.generate(ids, **options))


@pytest.mark.parametrize("config", [CONFIGS["PT"], METHODS["lora"](rank=2)], ids=["pt", "lora"])
def test_what_a_base_reads_for_each_token_is_refused_as_nothing_says_what_it_is_for_the_prompt(config):
    base, ids = tiny("gpt2"), tokens(4)[None]
    model = prompted(base, config)
    for name, value in (("token_type_ids", torch.ones_like(ids)), ("cu_seq_lens_q", torch.tensor([0, 2, 4]))):
        with pytest.raises(PtmoeError, match=name):
            model(ids, **{name: value})
    with pytest.raises(PtmoeError, match="generate takes no token_type_ids"):
        model.generate(ids, token_type_ids=torch.ones_like(ids), max_new_tokens=2)
    model = prompted(tiny_llama(), config)  # it does not read them
    assert torch.equal(model(ids, token_type_ids=torch.ones_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("config", ["PT-MoE selective probationary", "SMoP", "ATTEMPT"])
def test_a_routed_row_without_input_tokens_is_an_error(config):
    model = prompted(tiny_llama(), CONFIGS[config])
    ids = torch.stack([tokens(6, 1), tokens(6, 2)])
    labels = torch.where(torch.tensor([[True], [False]], device=DEVICE), -100, ids)
    with pytest.raises(ValueError, match="no input token"):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match="no input token"):
        model(ids, torch.tensor([[1] * 6, [0] * 6], device=DEVICE))


def test_training_without_labels_needs_to_know_what_the_router_may_read():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"]).train()
    ids = tokens(5)[None]
    with pytest.raises(PtmoeError, match="neither labels nor input_mask"):
        model(ids)
    assert model(ids, input_mask=torch.tensor([[1, 1, 1, 0, 0]], device=DEVICE)).logits.requires_grad


def test_a_model_without_a_decoders_embeddings_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(PtmoeError, match="T5ForConditionalGeneration is not a decoder"):
        attach(T5ForConditionalGeneration(T5Config(**sizes)), PTConfig())


# -- as a transformers model -------------------------------------------------------------------------------------------


def test_it_has_what_a_transformers_model_has(base, capsys):
    model = prompted(base, CONFIGS["PT"])
    assert model.config is base.config
    assert model.dtype == torch.float32
    assert model.device == base.device
    model.print_trainable_parameters()
    trainable, total = 5 * HIDDEN, 5 * HIDDEN + sum(parameter.numel() for parameter in base.parameters())
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


def test_hidden_states_and_kept_logits_are_those_asked_for(base):
    model = prompted(base, CONFIGS["PT"])
    ids = torch.stack([tokens(6, 1), tokens(6, 2)])
    out = model(ids, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [(2, 5 + 6, HIDDEN)] * 3
    assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    assert_close(model(ids, labels=ids, logits_to_keep=1).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("kind", ["hidden_states", "attentions"])
def test_what_the_bases_config_asks_for_is_as_in_a_call_that_asks_for_it_in_training_too(kind):
    base = tiny_llama(attn_implementation="eager")
    model = prompted(base, CONFIGS["PT"]).train()
    expected = model(**MIXED, **{f"output_{kind}": True})[kind]
    setattr(base.config, f"output_{kind}", True)
    assert_close(model(**MIXED)[kind], expected)


def test_gradient_checkpointing_changes_no_gradient():
    model = prompted(tiny_llama(), CONFIGS["PT-MoE selective probationary"].replace(router_noise=0))
    assert_close(*checkpointed_gradients(model, MIXED), atol=1e-7, rtol=1e-5)


# -- transformers.Trainer ----------------------------------------------------------------------------------------------


def dataset():
    examples = []
    for i in range(16):
        one = supervised([tokens(2 + i % 5, i)], [tokens(1 + i % 4, 50 + i)], [0])
        examples.append({key: value[0].cpu() for key, value in one.items()})
    return examples


def trained(folder, *, size=4, accumulate=1, resume=None, noise=0.0, **arguments):
    model = attach(tiny_llama(), PTMoEConfig(**PT_MOE, router_noise=noise))
    options = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        use_cpu=DEVICE.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **({"max_steps": 3, "save_strategy": "no", "learning_rate": 0.05} | arguments),
    )
    trainer = Trainer(
        model=model, args=options, train_dataset=dataset(), eval_dataset=dataset()[:4], data_collator=collate
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def adapter_of(trainer):
    return {key: value.detach() for key, value in trainer.model.encoder.named_parameters()}


@pytest.mark.slow
def test_trainer_gives_the_same_adapter_however_the_batch_is_accumulated(tmp_path):
    whole = trained(tmp_path, size=4, accumulate=1, optim="sgd", max_grad_norm=0)
    parts = trained(tmp_path, size=2, accumulate=2, optim="sgd", max_grad_norm=0)
    for key, value in adapter_of(whole).items():
        assert_close(adapter_of(parts)[key], value, atol=1e-6, rtol=1e-5)
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (whole, parts)]
    assert_close(*losses, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_trainers_checkpoints_hold_no_base_weights_and_resume_where_they_stopped(tmp_path):
    through = trained(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, noise=0.3)
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert {key.removeprefix("encoders.default.") for key in saved} == {*adapter_of(through), "base_fingerprint"}
    whole = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert whole < 4 * through.model.base_model.num_parameters()
    resumed = trained(tmp_path / "resumed", max_steps=4, resume=str(checkpoint), noise=0.3)
    assert resumed.state.global_step == 4
    for key, value in adapter_of(through).items():
        assert torch.equal(adapter_of(resumed)[key], value), key


def test_trainer_evaluates_with_the_loss_of_the_model(tmp_path):
    trainer = trained(tmp_path)
    expected = trainer.model.eval()(**on_device(collate(dataset()[:4]))).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
