"""`--score choices`: what a label's likelihood is, that the router never sees it, that no batch changes a choice."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

import ptmoe
from ptmoe.compare import compare, prepare, read_plan
from ptmoe.evaluate import evaluate
from ptmoe.evaluate.choices import choose, label_tokens, likelihoods
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.report import read_comparison, write_report
from ptmoe.tasks import TASKS, Example, Task, load_task
from ptmoe.tasks.base import Split
from ptmoe.tasks.tokens import encode_completion, encode_prompt
from ptmoe.train import TrainOptions, train
from testing.bases import CONFIGS, prompted, tiny, tokens

ROUTED = CONFIGS["PT-MoE selective probationary"]
PROMPTS = [tokens(length, length).tolist() for length in (6, 2, 11, 4, 9)]
# Of one token, of several, with shared beginnings: each of two prompts has the same.
LABELS = [
    {"a": [7], "b": [9], "c": [21]},
    {"a": [7, 8], "b": [7, 9], "c": [30, 31, 32]},
    {"a": [5], "b": [40, 41]},
    {"a": [7], "b": [9], "c": [21]},
    {"a": [12, 13, 14], "b": [12, 13, 15], "c": [12, 16], "d": [3]},
]
NEAR = 1e-4  # far below a near tie


def by_hand(model, prompt, ids):
    """One label after its prompt, alone."""
    row = torch.tensor([prompt + ids], device=model.device)
    readable = torch.arange(row.shape[1], device=row.device)[None] < len(prompt)
    with torch.no_grad():
        scores = model(row, input_mask=readable).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(ids, device=row.device)[:, None]).sum())


def adapted(base):
    return prompted(base, ROUTED)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_a_likelihood_is_the_sum_of_the_labels_log_probabilities_behind_the_prompts_own_prompt(base, size):
    model = adapted(base)
    found = likelihoods(model, PROMPTS, LABELS, size)
    for prompt, labels, scores in zip(PROMPTS, LABELS, found, strict=True):
        assert scores.keys() == labels.keys()
        for label, ids in labels.items():
            assert scores[label] == pytest.approx(by_hand(model, prompt, ids), abs=NEAR)


def test_the_router_never_sees_a_label(base):
    """A likelihood is that of the expert for the prompt, whatever other label stands beside it; the gate likewise."""
    model = adapted(base)
    routed = [model.route(torch.tensor([prompt], device=model.device)).gate[0] for prompt in PROMPTS]
    assert len({int(gate.argmax()) for gate in routed}) > 1, "one expert takes all: tells nothing"
    others = [[{**labels, "a": [n, n + 1, n + 2]} for labels in LABELS] for n in (44, 60)]
    first, second = (likelihoods(model, PROMPTS, labels, 1) for labels in others)
    for one, other in zip(first, second, strict=True):
        assert one["a"] != other["a"]
        assert {label: score for label, score in one.items() if label != "a"} == {
            label: score for label, score in other.items() if label != "a"
        }
    for completion, gate in zip(choose(model, PROMPTS, others[0]), routed, strict=True):
        assert completion.gate == pytest.approx(gate.tolist(), abs=1e-6)


@pytest.mark.parametrize("method", ["PT-MoE neither", "PT", "none", "prefix-tuning", "lora"])
def test_choices_are_the_same_in_every_batch_and_for_every_order_of_labels(method):
    base = tiny("llama")
    if method == "none":
        model = PromptedCausalLM(base)
    elif method in CONFIGS:
        model = prompted(base, CONFIGS[method])
    else:
        model = attach(base, ptmoe.METHODS[method](), seed=1)
    model.eval()
    chosen = [completion.text for completion in choose(model, PROMPTS, LABELS)]
    for prompt, labels, label in zip(PROMPTS, LABELS, chosen, strict=True):
        scores = {other: by_hand(model, prompt, ids) for other, ids in labels.items()}
        assert scores[label] == max(scores.values())
    for size in (1, 2, 3):
        parts = [slice(start, start + size) for start in range(0, len(PROMPTS), size)]
        assert [c.text for part in parts for c in choose(model, PROMPTS[part], LABELS[part])] == chosen
    backwards = [dict(reversed(labels.items())) for labels in LABELS]
    assert [completion.text for completion in choose(model, PROMPTS, backwards)] == chosen


def test_of_equally_likely_labels_the_first_in_the_alphabet_is_chosen_in_every_batch():
    base = tiny("llama")
    with torch.no_grad():  # pairs of words that differ by less than a batch's rounding
        head = base.get_output_embeddings().weight
        head[1::2] = head[0::2]
    model = adapted(base)
    for labels in ({"x": [8], "b": [9]}, {"b": [9], "x": [8]}, {"b": [8], "x": [9]}):
        for size in (1, 2, 5):
            parts = [PROMPTS[start : start + size] for start in range(0, len(PROMPTS), size)]
            assert {c.text for part in parts for c in choose(model, part, [labels] * len(part))} == {"b"}


def test_labels_are_tokenised_as_in_training_and_one_that_begins_another_is_refused(monkeypatch):
    _, tokenizer = load_base("nano")
    example = Example("1", "harbor: 1 and 2 =>", "", ("3",), "t")
    for label, ids in label_tokens(("5", "30 and 4", "key"), example, tokenizer).items():
        whole = encode_completion(replace(example, target=f" {label}"), tokenizer)
        assert whole == [*ids, tokenizer.eos_token_id]
    with pytest.raises(ptmoe.PtmoeError, match=r"tokens of the label 'key cup' begin with those of 'key'.*answers"):
        label_tokens(("key", "key cup"), example, tokenizer)
    for label, ids in label_tokens(("cup", "key"), example, tokenizer, chat=True).items():
        assert encode_completion(replace(example, target=f" {label}"), tokenizer, chat=True)[: len(ids)] == ids
        assert tokenizer.decode(ids).strip() == label
    template = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}: {% endif %}"
    template += "{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ptmoe.PtmoeError, match="template does not begin an answer with the label 'cup': use --no-chat"):
        label_tokens(("cup", "key"), example, tokenizer, chat=True)


# ---- evaluations -----------------------------------------------------------------------------------------------------


def larger(name, split):
    """Which of two numbers is the larger? Two domains."""
    for number in range(40 if split == "train" else 24):
        first, second = 7 * number % 20, 3 * number % 17
        word = "cup" if first > second else "key"
        yield Example(f"{split}-{number}", f"castle: {first} and {second} =>", f" {word}", (word,), name)


@pytest.fixture
def task(monkeypatch):
    task = Task(
        name="larger",
        splits={"train": Split(40), "test": Split(24)},
        grader="verbatim",
        metric="accuracy",
        max_new_tokens=6,
        chat=False,
        generate=larger,
        labels=("key", "cup", "pen"),
    )
    mixed = Task("two", {"train": Split(None), "test": Split(None)}, "verbatim", "accuracy", 6, chat=False)
    monkeypatch.setitem(TASKS, "larger", task)
    monkeypatch.setitem(TASKS, "smaller", replace(task, name="smaller", labels=("cup", "key")))
    monkeypatch.setitem(TASKS, "two", replace(mixed, parts=("larger", "smaller")))
    return task


@pytest.fixture(scope="module")
def routed():
    base, tokenizer = load_base("nano")
    model = attach(base, ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=3, rank=3), seed=3)
    with torch.no_grad():
        model.encoder.router.weight.mul_(30)
    return model.eval(), tokenizer


@pytest.mark.slow
def test_every_batch_size_writes_the_same_file_and_every_answer_is_a_label(task, routed, tmp_path):
    examples = load_task("two", "test")
    files = []
    for number, size in enumerate(({"batch_size": 1}, {"batch_size": 5}, {"tokens_per_batch": 300})):
        folder = tmp_path / str(number)
        evaluation = evaluate(*routed, examples, task=TASKS["two"], score="choices", folder=folder, **size)
        files.append((folder / "predictions" / "two.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    summary = evaluation.summary()
    assert summary.no_label == 0
    assert summary.metrics.keys() == summary.interval.keys() == {"accuracy", "macro_f1"}
    assert summary.by_domain.keys() == {"larger", "smaller"}
    assert summary.metrics["macro_f1"] == pytest.approx(summary.mean_of_domains["macro_f1"])
    assert evaluation.metrics == summary.metrics
    lines = [json.loads(line) for line in files[0].splitlines()]
    assert all(line["completion"] in TASKS[line["domain"]].labels for line in lines)
    model, tokenizer = routed
    by_id = {example.id: example for example in examples}
    for line in lines[:6]:
        ids = encode_prompt(by_id[line["id"]], tokenizer).ids
        scores = {
            label: by_hand(model, ids, tokenizer(f" {label}", add_special_tokens=False)["input_ids"])
            for label in TASKS[line["domain"]].labels
        }
        assert scores[line["completion"]] == max(scores.values())
    with pytest.raises(ptmoe.PtmoeError, match="score was 'choices', is None"):
        evaluate(*routed, examples, task=TASKS["two"], folder=folder)


def test_written_answers_that_are_no_label_are_counted(task, routed):
    evaluation = evaluate(*routed, load_task("larger", "test"), max_new_tokens=2)
    wrong = sum(prediction.completion.strip() not in task.labels for prediction in evaluation.predictions)
    assert evaluation.summary().no_label == wrong


def test_choices_are_refused_where_there_are_no_labels_before_any_work(task, routed, tmp_path, run, monkeypatch):
    with pytest.raises(ptmoe.PtmoeError, match="which nano/mixed lacks"):
        evaluate(*routed, load_task("nano/mixed", max_examples=4), score="choices")
    mixed = {"task": "larger", "eval_task": "larger,nano/mixed", "score": "choices", "max_steps": 1}
    with pytest.raises(ptmoe.PtmoeError, match="which nano/mixed lacks"):
        train(TrainOptions(**mixed, output_dir=str(tmp_path / "run")))
    monkeypatch.setitem(TASKS, "larger", replace(task, labels=("cup", "cup key")))
    with pytest.raises(ptmoe.PtmoeError, match="label 'cup key' begin with those of 'cup'"):
        train(TrainOptions(task="larger", score="choices", max_steps=1, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    plan = {"tasks": ["larger"], "eval_tasks": ["larger,nano/words"], "score": "choices"}
    with pytest.raises(ptmoe.PtmoeError, match="which nano/words lacks"):
        prepare(read_plan(None, {**plan, "output_dir": str(tmp_path / "c")}), say=lambda _: None)
    status, _, error = run(
        *"eval --model nano --task larger --task nano/words --score choices --output-dir".split(), tmp_path / "e"
    )
    assert status == 2
    assert "nano/words lacks" in error


def test_a_sample_smaller_than_a_mixture_is_refused_before_any_work(task, tmp_path):
    for options in ({"max_examples": 1}, {"eval_examples": 1, "eval_task": "two"}):
        with pytest.raises(ptmoe.PtmoeError, match="1 examples of two, which mixes 2 tasks"):
            train(TrainOptions(task="two", max_steps=1, output_dir=str(tmp_path / "run"), **options))
        changes = {name: value for name, value in options.items() if name != "eval_task"}
        plan = {"tasks": ["two"], **changes, "output_dir": str(tmp_path / "c")}
        with pytest.raises(ptmoe.PtmoeError, match="1 examples of two, which mixes 2 tasks"):
            prepare(read_plan(None, plan), say=lambda _: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_by_choices_reports_macro_f1(task, tmp_path):
    plan = {
        "methods": [{"name": "pt", "num_virtual_tokens": 3}, {"name": "base"}],
        "tasks": ["two"],
        "score": "choices",
        "max_steps": 1,
        "jobs": 1,
        "output_dir": str(tmp_path / "c"),
    }
    assert not compare(prepare(read_plan(None, plan), say=lambda _: None))
    scores = read_comparison(tmp_path / "c").scores
    assert Counter(scores["metric"]) == {"accuracy": 8, "macro_f1": 8}
    assert {"larger", "smaller"} <= set(scores["of"])
    page = write_report(tmp_path / "c").read_text()
    assert "macro F1" in page
    assert "has no score" not in page
    # The same command goes on from here; with written answers it is another comparison.
    with pytest.raises(ptmoe.PtmoeError, match="score was 'choices', is 'answers'"):
        prepare(read_plan(tmp_path / "c", {"score": "answers"}), say=lambda _: None)
