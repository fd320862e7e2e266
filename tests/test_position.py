"""A prompt after the first token, a gate that keeps several experts, and the loss that balances them."""

import pytest
import torch
from bases import PT_MOE, batch, prompted, tiny_llama, tokens

import ptmoe
from ptmoe.methods import PTConfig, PTMoEConfig
from ptmoe.methods.routing import gate, imbalance
from ptmoe.models.attach import attach

AFTER = PTMoEConfig(**PT_MOE, position="after")
ROWS = [tokens(5), tokens(9, 1), tokens(2, 2)]


def by_hand(model, row):
    """`(L, V)`: the logits of `[x_0, P, x_1, …]`; after the first token those of the last virtual one."""
    embeds = model.get_input_embeddings()(row[None])
    prompt = model.encoder(embeds, torch.ones(1, len(row), dtype=torch.bool)).embeds
    joined = torch.cat([embeds[:, :1], prompt, embeds[:, 1:]], 1)
    return model.base_model(inputs_embeds=joined).logits[0, prompt.shape[1] :]


@torch.no_grad()
def test_after_the_first_token_the_logits_are_those_spliced_by_hand_whatever_the_padding(base):
    model = prompted(base, AFTER).eval()
    wanted = [by_hand(model, row) for row in ROWS]
    for lefts, width in ([0, 0, 0], 12), ([4, 0, 7], 9), ([1, 3, 2], 15):
        ids, mask = batch(ROWS, lefts, width)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, left, expected in zip(logits, lefts, wanted, strict=True):
            torch.testing.assert_close(row[left : left + len(expected)], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_after_the_first_token_it_generates_what_the_hand_spliced_input_does(base):
    model = prompted(base, AFTER).eval()
    ids, mask = batch(ROWS, [4, 0, 7], 9)
    made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :]
    for row, new in zip(ROWS, made, strict=True):
        sequence = row
        for token in new:
            # The prompt is composed from the input alone, and stays what it is.
            embeds = model.get_input_embeddings()(sequence[None])
            prompt = model.encoder(embeds[:, : len(row)], torch.ones(1, len(row), dtype=torch.bool)).embeds
            joined = torch.cat([embeds[:, :1], prompt, embeds[:, 1:]], 1)
            assert model.base_model(inputs_embeds=joined).logits[0, -1].argmax() == token
            sequence = torch.cat([sequence, token[None]])


def test_a_first_token_has_no_predictor_there_and_is_left_out_of_the_loss():
    model = attach(tiny_llama(), PTConfig(num_virtual_tokens=3, position="after"))
    row = tokens(6)[None]
    labels = row.clone()
    whole = model(input_ids=row, labels=labels).loss
    labels[0, 0] = -100
    assert torch.equal(model(input_ids=row, labels=labels).loss, whole)
    before = attach(tiny_llama(), PTConfig(num_virtual_tokens=3))
    assert not torch.equal(before(input_ids=row, labels=row).loss, before(input_ids=row, labels=labels).loss)


@torch.no_grad()
def test_one_batch_mixes_prompts_before_and_after(base):
    model = prompted(base, AFTER, name="after")
    model = prompted(model, PTConfig(num_virtual_tokens=4), seed=2, name="before").eval()
    ids, mask = batch(ROWS, [4, 0, 7], 9)
    together = model(input_ids=ids, attention_mask=mask, adapter_names=["after", "before", "__base__"]).logits
    for index, name in enumerate(["after", "before"]):
        model.set_adapter(name)
        alone = model(input_ids=ROWS[index][None]).logits[0]
        left = [4, 0][index]
        torch.testing.assert_close(together[index, left : left + len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_the_position_is_saved_and_peft_has_no_form_for_it(tmp_path):
    model = attach(tiny_llama(), PTConfig(num_virtual_tokens=3, position="after"))
    model.save_pretrained(tmp_path / "a")
    assert ptmoe.load_adapter(tiny_llama(), tmp_path / "a").method_config.position == "after"
    from ptmoe.adapters.peft import to_peft

    with pytest.raises(ptmoe.PtmoeError, match="stands after the first token"):
        to_peft(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("probationary", [True, False])
def test_the_gate_keeps_the_top_k(probationary):
    probabilities = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.4, 0.1, 0.2, 0.3]])
    kept = gate(probabilities, selective=True, probationary=probationary, top_k=2)
    wanted = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]) * (probabilities if probationary else 1.0)
    torch.testing.assert_close(kept, wanted)
    every = gate(probabilities, selective=True, probationary=True, top_k=4)
    assert torch.equal(every, gate(probabilities, selective=False, probationary=True))


def test_imbalance_is_1_where_all_experts_are_used_alike_and_n_where_one_takes_all():
    even = torch.eye(4).repeat(2, 1)
    assert imbalance(even).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert imbalance(collapsed).item() == pytest.approx(4.0)
    assert imbalance(torch.full((8, 4), 0.25), top_k=4).item() == pytest.approx(1.0)


def test_the_balance_loss_is_added_in_training_only_once_for_the_global_batch_and_reaches_the_router():
    config = PTMoEConfig(**PT_MOE, balance_loss=0.5, router_noise=0.0)
    plain = PTMoEConfig(**PT_MOE, router_noise=0.0)
    ids = torch.stack([tokens(6, seed) for seed in range(4)])
    labels = ids.clone()
    labels[:, :3] = -100

    def losses(config, *, training, parts=1):
        model = prompted(tiny_llama(), config).train(training)
        chunks = zip(ids.chunk(parts), labels.chunk(parts), strict=True)
        count = (labels != -100).sum()
        return sum(model(input_ids=i, labels=t, num_items_in_batch=count).loss for i, t in chunks), model

    whole, model = losses(config, training=True)
    base, _ = losses(plain, training=True)
    routing = model(input_ids=ids, labels=labels).routing
    assert (whole - base).item() == pytest.approx(0.5 * imbalance(routing.probabilities).item(), rel=1e-5)
    assert losses(config, training=False)[0].item() == pytest.approx(losses(plain, training=False)[0].item(), rel=1e-6)
    halves = (losses(config, training=True, parts=2)[0] - losses(plain, training=True, parts=2)[0]).item()
    each = [imbalance(routing.probabilities[i : i + 2]).item() for i in (0, 2)]
    assert halves == pytest.approx(0.5 * sum(each) / 2, rel=1e-4)
    whole.backward()
    assert model.encoder.router.weight.grad.abs().sum() > 0


def test_unfit_sizes_of_the_gate_are_refused():
    with pytest.raises(ptmoe.PtmoeError, match="top_k=3 exceeds num_experts=2"):
        PTMoEConfig(top_k=3)
    with pytest.raises(ptmoe.PtmoeError, match="without selective"):
        PTMoEConfig(top_k=2, selective=False)
    with pytest.raises(ptmoe.PtmoeError, match="position"):
        PTMoEConfig(position="behind")
