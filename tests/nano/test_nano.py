"""The embedded base: what it can do when instructed, that it fails otherwise, and how it was pretrained."""

from itertools import islice

import pytest
import torch

from ptmoe import nano
from ptmoe.evaluate import evaluate
from ptmoe.methods import PTConfig
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base
from ptmoe.nano.pretrain import (
    SEED,
    answer_loss,
    build_model,
    build_tokenizer,
    load_checkpoint,
    packed_batches,
    pretrain,
    save_checkpoint,
)
from ptmoe.nano.world import SKILLS, instructed
from ptmoe.tasks import load_task


@pytest.fixture(scope="module")
def base():
    return load_base("nano")


def accuracy_by_domain(base, task):
    model, tokenizer = base
    prompted = attach(model, PTConfig(num_virtual_tokens=1))
    with prompted.disable_adapter():
        evaluation = evaluate(prompted, tokenizer, load_task(task, "test"), batch_size=250)
    return evaluation.metrics["accuracy"], evaluation.summary().by_domain


@pytest.mark.slow
def test_instructed_in_words_every_skill_reaches_90_percent(base):
    _, parts = accuracy_by_domain(base, "nano/skills")
    assert parts.keys() == SKILLS.keys()
    assert {name: part["accuracy"] for name, part in parts.items() if part["accuracy"] < 90} == {}


@pytest.mark.parametrize("task", ["nano/mixed", "nano/words", "nano/facts", "nano/all"])
@pytest.mark.slow
def test_without_the_instruction_the_base_fails(base, task):
    accuracy, _ = accuracy_by_domain(base, task)
    assert accuracy < 35


def test_the_weights_fit_in_the_package():
    assert sum(path.stat().st_size for path in nano.FOLDER.iterdir()) < 12_000_000


@pytest.mark.parametrize("text", ["Ünïcode — 漢字 🙂\n\ttabs", "12345", "", "harbor: 12 and 30 => 42"])
def test_any_text_encodes_and_decodes(base, text):
    _, tokenizer = base
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_digit_is_a_token(base):
    _, tokenizer = base
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_the_shipped_tokenizer_is_the_one_the_script_builds(base):
    assert build_tokenizer().get_vocab() == base[1].get_vocab()


def test_pretraining_records_never_hold_a_test_input():
    held_out = {record.input for record in islice(instructed(1, test=True), 500)}
    assert not held_out & {record.input for record in islice(instructed(SEED + 2, test=False), 5000)}


@pytest.mark.slow
def test_a_packed_record_attends_to_itself_only():
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer)).eval()
    batch = next(packed_batches(tokenizer, phase=0))
    first, second = (batch["position_ids"][0] == 0).nonzero().flatten()[1:3].tolist()
    with torch.no_grad():
        packed = model.model(
            input_ids=batch["input_ids"][:1], position_ids=batch["position_ids"][:1], use_cache=False
        ).last_hidden_state[:, first:second]
        alone = model.model(input_ids=batch["input_ids"][:1, first:second]).last_hidden_state
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_pretraining_loss_is_that_of_the_answers():
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    batch = {name: value[:2] for name, value in next(packed_batches(tokenizer, phase=0)).items()}
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.detach()
    terms = [
        -logits[row, place - 1].log_softmax(0)[label]
        for row, place in (batch["labels"] != -100).nonzero().tolist()
        for label in [batch["labels"][row, place]]
    ]
    torch.testing.assert_close(answer_loss(model, batch).detach(), torch.stack(terms).mean())


@pytest.mark.slow
def test_an_interrupted_pretraining_resumes_with_the_same_weights_and_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr("ptmoe.nano.pretrain.ROWS", 2)
    tokenizer = build_tokenizer()
    batch = next(packed_batches(tokenizer, phase=0))

    def model_and_optimizer():
        model = build_model(len(tokenizer))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        optimizer.zero_grad()
        answer_loss(model, batch).backward()
        optimizer.step()

    first, resumed = model_and_optimizer(), model_and_optimizer()
    step(*first)
    step(*first)
    save_checkpoint(tmp_path / "c.safetensors", *first, 2)
    assert load_checkpoint(tmp_path / "c.safetensors", *resumed) == 2
    step(*first)
    step(*resumed)
    for (name, value), other in zip(first[0].named_parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.slow
def test_pretraining_writes_a_model_that_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("ptmoe.nano.pretrain.ROWS", 2)
    monkeypatch.setattr("ptmoe.nano.pretrain.skill_accuracy", lambda *_: {})
    pretrain(tmp_path / "base", 2)
    model, tokenizer = load_base(str(tmp_path / "base"))
    assert model.config.vocab_size == len(tokenizer)
    assert not (tmp_path / "base" / "pretraining.safetensors").exists()
