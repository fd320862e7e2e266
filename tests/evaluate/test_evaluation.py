"""Evaluation: the same for every batch size, resumable after any kill, nothing lost and nothing done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ptmoe
from ptmoe.evaluate import evaluate
from ptmoe.evaluate.generation import NEAR_TIE, complete
from ptmoe.fast.linear import use_onednn
from ptmoe.models.attach import attach
from ptmoe.models.bases import load_base
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.tasks import Example, load_task, local, task_named
from ptmoe.tasks.predictions import read_predictions
from ptmoe.tasks.resampling import Group, bootstrap_interval
from ptmoe.tasks.tokens import completion_text, encode_prompt
from testing.bases import CONFIGS, prompted, tiny

TASK = "nano/all"


@pytest.fixture(scope="module")
def routed():
    """nano with an untrained adapter whose router sends different inputs to different experts."""
    base, tokenizer = load_base("nano")
    model = attach(base, ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=3, rank=3), seed=3)
    with torch.no_grad():
        model.encoder.router.weight.mul_(30)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def examples():
    return load_task(TASK, max_examples=90)


def evaluated(routed, examples, folder, **options):
    model, tokenizer = routed
    options = {"batch_size": 8, "max_new_tokens": 6, **options}
    return evaluate(model, tokenizer, examples, folder=folder, **options)


def predictions(folder):
    return (folder / "predictions" / "nano__all.jsonl").read_bytes()


@pytest.mark.slow
def test_batch_sizes_1_3_and_32_give_the_same_file_and_scores(routed, examples, tmp_path):
    results = {size: evaluated(routed, examples, tmp_path / str(size), batch_size=size) for size in (1, 3, 32)}
    assert predictions(tmp_path / "1") == predictions(tmp_path / "3") == predictions(tmp_path / "32")
    summaries = [evaluation.summary() for evaluation in results.values()]
    assert all(summary.metrics == summaries[0].metrics for summary in summaries)
    assert all(summary.interval == summaries[0].interval for summary in summaries)
    lines = [json.loads(line) for line in predictions(tmp_path / "1").splitlines()]
    assert len({max(range(3), key=line["gate"].__getitem__) for line in lines}) > 1, (
        "one expert takes all: tells nothing"
    )
    assert len({line["completion"] for line in lines}) > 10


@pytest.mark.slow
def test_where_the_best_tokens_tie_every_batch_takes_the_same():
    """All scores equal: whatever a batch's rounding prefers, the row's own preference counts."""
    base = tiny("llama", eos_token_id=None)
    with torch.no_grad():  # pairs of vocabulary rows that differ by less than a batch's rounding
        head = base.get_output_embeddings().weight
        head[1::2] = head[0::2] * (1 + 1e-7)
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    _, tokenizer = load_base("nano")
    prompts = [list(range(3, 3 + length)) for length in (5, 9, 9, 14, 20, 2, 31)]

    def completed(size):
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [completion for chunk in chunks for completion in complete(model, tokenizer, chunk, max_new_tokens=8)]

    assert completed(1) == completed(3) == completed(7)


def test_scores_in_a_batch_differ_from_a_rows_own_by_far_less_than_a_near_tie(base):
    model = prompted(base, CONFIGS["PT-MoE selective probationary"])
    rows = [torch.arange(3, 3 + length, device=model.device) for length in (4, 9, 17, 30)]
    ids = torch.stack([torch.nn.functional.pad(row, (30 - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (30 - len(row), 0)) for row in rows])
    with torch.no_grad(), use_onednn(model.base_model):  # as in decoding
        together = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        alone = torch.cat([model(input_ids=row[None]).logits[:, -1] for row in rows])
    assert (together - alone).abs().max() < NEAR_TIE / 10


@pytest.mark.slow
def test_stopped_at_ten_random_points_it_ends_with_the_undisturbed_file(routed, examples, tmp_path):
    evaluated(routed, examples, tmp_path / "whole")
    whole = predictions(tmp_path / "whole")
    drawn = random.Random(0)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        stop_after = drawn.randrange(len(examples))

        def stop(done, total, stop_after=stop_after):
            if done >= stop_after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluated(routed, examples, folder, progress=stop)
        # A kill in the middle of writing leaves part of what was to be written.
        path = folder / "predictions" / "nano__all.jsonl"
        written = len(path.read_bytes())
        os.truncate(path, drawn.randrange(written + 1))
        answered = []
        evaluated(routed, examples, folder, progress=lambda done, total, answered=answered: answered.append(done))
        assert path.read_bytes() == whole
        assert answered[-1] == len(examples)
        assert json.loads((folder / "eval" / "nano__all.json").read_text())["examples"] == len(examples)


@pytest.mark.slow
def test_a_killed_command_resumes_where_it_stopped(tmp_path):
    """SIGKILL, twice, to the command itself."""
    base, _ = load_base("nano")
    attach(base, ptmoe.PTConfig(num_virtual_tokens=4)).save_pretrained(tmp_path / "adapter")

    def command(folder):
        arguments = ["eval", "adapter", "--task", "nano/all", "--examples", "300", "--batch-size", "2"]
        return subprocess.Popen(
            [sys.executable, "-m", "ptmoe", *arguments, "--max-new-tokens", "12", "--output-dir", folder],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    path = tmp_path / "killed" / "predictions" / "nano__all.jsonl"
    for least in (1, 30_000):
        running = command("killed")
        waited = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size >= least):
            assert running.poll() is None, "ended before it could be killed"
            assert time.monotonic() < waited
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not (tmp_path / "killed" / "eval").exists()
    assert command("killed").wait() == 0
    assert command("whole").wait() == 0
    assert path.read_bytes() == (tmp_path / "whole" / "predictions" / "nano__all.jsonl").read_bytes()


def test_predictions_of_another_base_of_the_same_name_are_not_resumed(routed, examples, tmp_path):
    evaluated(routed, examples[:10], tmp_path)
    weight = routed[0].base_model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(0.1)
    try:
        with pytest.raises(ptmoe.PtmoeError, match="weights was"):
            evaluated(routed, examples[:10], tmp_path)
    finally:
        with torch.no_grad():
            weight.sub_(0.1)


def test_an_answer_graded_as_a_whole_has_room_for_the_longest_right_one(routed, tmp_path):
    model, tokenizer = routed
    words = " ".join(["the baker of the harbor"] * 30)
    long = [Example("1", "what is it ?", f" {words}", (words,), "mine.jsonl")]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (words, f" {words}")]
    made, needed = evaluate(model, tokenizer, long, task=local.task("mine.jsonl")), min(lengths)
    assert made.summary().settings["max_new_tokens"] == max(lengths) > 64
    with pytest.warns(
        UserWarning, match=rf"1 of 1 right answers have more than max_new_tokens=9 tokens, up to {needed}"
    ):
        evaluate(model, tokenizer, long, task=local.task("mine.jsonl"), max_new_tokens=9)


@pytest.mark.parametrize("thoughts", ["", "first the larger, then the smaller " * 40])
@pytest.mark.parametrize("length", [1, 80])
def test_an_answer_behind_what_a_template_writes_before_it_has_room_for_both(length, thoughts, routed, monkeypatch):
    model, tokenizer = routed
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}<{{ m.role }}>{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' if m.role == "
        "'assistant' }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    answer = " ".join(["7"] * length)
    reply = {"reasoning_content": thoughts} if thoughts else {}
    turn = ({"role": "user", "content": "Which?"},)
    example = Example("1", "", answer, (answer,), "mine.jsonl", messages=turn, reply=reply)
    said = tokenizer(completion_text(example, tokenizer).removesuffix("\n"), add_special_tokens=False)["input_ids"]

    def decoder(prompts, experts, *, max_new_tokens, **options):
        return [said[:max_new_tokens] for _ in prompts]

    monkeypatch.setattr("ptmoe.evaluate.evaluation.Decoder", lambda model: decoder)
    assert evaluate(model, tokenizer, [example], task=local.task("mine.jsonl")).metrics == {"accuracy": 100.0}


def test_predictions_of_another_evaluation_are_not_resumed(routed, examples, tmp_path):
    evaluated(routed, examples[:10], tmp_path)
    before = predictions(tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="max_new_tokens was 6, is 5"):
        evaluated(routed, examples[:10], tmp_path, max_new_tokens=5)
    with pytest.raises(ptmoe.PtmoeError, match="examples was 10, is 11"):
        evaluated(routed, examples[:11], tmp_path)
    other = attach(routed[0].base_model, ptmoe.PTConfig(num_virtual_tokens=4))
    with pytest.raises(ptmoe.PtmoeError, match="adapter was"):
        evaluated((other, routed[1]), examples[:10], tmp_path)
    assert predictions(tmp_path) == before
    evaluated(routed, examples[:10], tmp_path, max_new_tokens=5, overwrite=True)
    path = tmp_path / "predictions" / "nano__all.jsonl"
    path.write_text("not a prediction\n")
    with pytest.raises(ptmoe.PtmoeError, match="line 1 is no prediction"):
        evaluated(routed, examples[:10], tmp_path, max_new_tokens=5)


CHANGES = {"id": "other", "input": "harbor: 1 and 2 =>", "references": ("3",), "domain": "elsewhere"}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("change", [*CHANGES, "chat template"])
def test_no_evaluation_is_resumed_with_anything_else_that_is_asked_or_reported(change, examples, tmp_path):
    model, tokenizer = load_base("nano")
    routed = attach(model, ptmoe.PTConfig(num_virtual_tokens=4)), tokenizer
    tokenizer.chat_template = TEMPLATE

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(routed, examples[:10], tmp_path, chat=True, progress=stop)
    last = examples[9]
    changed = last
    if change == "chat template":
        tokenizer.chat_template = TEMPLATE.replace("m.role", "m.role | upper")
    else:
        changed = replace(last, **{change: CHANGES[change]})
    with pytest.raises(ptmoe.PtmoeError, match=r"predictions of another evaluation \(data was"):
        evaluated(routed, [*examples[:9], changed], tmp_path, chat=True)
    tokenizer.chat_template = TEMPLATE
    assert len(evaluated(routed, examples[:10], tmp_path, chat=True).predictions) == 10


def test_the_results_of_predictions_that_are_discarded_go_with_them(routed, examples, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    evaluated(routed, examples[:10], tmp_path)
    results = tmp_path / "eval" / "nano__all.json"
    whole = results.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        evaluated(routed, examples[:10], tmp_path, overwrite=True, progress=stop)
    assert not results.exists()
    evaluated(routed, examples[:10], tmp_path)
    assert json.loads(results.read_bytes())["metrics"] == json.loads(whole)["metrics"]


def test_a_line_says_all_that_was_asked_and_answered(routed, examples, tmp_path):
    evaluation = evaluated(routed, examples[:9], tmp_path)
    lines = [json.loads(line) for line in predictions(tmp_path).splitlines()]
    assert {line["id"] for line in lines} == {example.id for example in examples[:9]}
    by_id = {example.id: example for example in examples}
    for line, prediction in zip(lines, evaluation.predictions, strict=True):
        example = by_id[line["id"]]
        assert line["prompt"] == example.input
        assert line["references"] == list(example.references)
        assert line["scores"] == {"accuracy": float(line["completion"].split() == example.references[0].split())}
        assert sum(line["gate"]) <= 1
        assert line["completion"] == prediction.completion


def test_a_long_context_is_cut_from_its_end_and_counted_and_a_question_that_does_not_fit_scores_0(routed, tmp_path):
    path = tmp_path / "long.jsonl"
    long = {"question": "Who has the key?", "context": "Ann has the key. " + "Bob has a cup. " * 40, "answers": ["Ann"]}
    hopeless = {"question": "Who? " * 200, "context": "Ann.", "answers": ["Ann"]}
    path.write_text("".join(json.dumps(record) + "\n" for record in (long, hopeless, {**long, "context": "Ann."})))
    evaluation = evaluated(routed, load_task(str(path)), tmp_path, max_length=120)
    summary = evaluation.summary()
    assert (summary.cut, summary.unanswered, summary.examples) == (1, 1, 3)
    by_id = {prediction.id: prediction for prediction in evaluation.predictions}
    assert by_id["long-1"].prompt.startswith("Ann has the key. Bob has")
    assert by_id["long-1"].prompt.endswith("\n\nQuestion: Who has the key?\nAnswer:")
    assert (by_id["long-2"].answered, by_id["long-2"].scores, by_id["long-2"].completion) == (
        False,
        {"accuracy": 0.0},
        "",
    )
    (file,) = (tmp_path / "predictions").glob("*.jsonl")
    written = read_predictions(file)
    assert {name for name, text in written.items() if text is None} == {"long-2"}


def test_the_cut_keeps_the_answer_in_training_and_the_beginning_in_evaluation():
    """Over many positions of the answer and many limits, in plain and in chat form: as many tokens as fit, all of the
    question, and in training the answer."""
    _, tokenizer = load_base("nano")
    drawn = random.Random(1)
    for _ in range(60):
        words = drawn.choices(["key", "cup", "pen", "hat", "größe", "日本"], k=80)
        place = drawn.randrange(80)
        words[place] = "Marylebone"
        context = " ".join(words)
        start = context.index("Marylebone")
        text = f"{context}\n\nQuestion: Where?\nAnswer:"
        example = Example(
            "1", text, " Marylebone", ("Marylebone",), "t", context=(0, len(context)), answer=(start, start + 10)
        )
        for chat in (False, True):
            whole = encode_prompt(example, tokenizer, chat=chat)
            room = drawn.randrange(60, len(whole.ids))
            trained = encode_prompt(example, tokenizer, chat=chat, room=room, around_answer=True)
            asked = encode_prompt(example, tokenizer, chat=chat, room=room)
            for cut in (trained, asked):
                assert room - 4 <= len(cut.ids) <= room  # a character of several tokens is cut as a whole
                assert len(cut.ids) + sum(cut.cut) == len(whole.ids)
                assert "�" not in tokenizer.decode(cut.ids)
                assert "Question: Where?\nAnswer:" in tokenizer.decode(cut.ids)
            assert "Marylebone" in tokenizer.decode(trained.ids)
            assert asked.cut[0] == 0
            kept = tokenizer.decode(asked.ids[: asked.context[1]])
            assert tokenizer.decode(whole.ids).startswith(kept)


def test_an_answer_ends_before_its_stop_text_and_generation_stops_there(routed, examples):
    model, tokenizer = routed
    prompts = [tokenizer(example.input)["input_ids"] for example in examples]
    texts = [completion.text for completion in complete(model, tokenizer, prompts, max_new_tokens=12)]
    whole = max(texts, key=len)
    prompt, stop = prompts[texts.index(whole)], whole.split()[1]
    steps = []
    forward = model.base_model.forward
    model.base_model.forward = lambda *a, **k: (steps.append(1), forward(*a, **k))[1]
    try:
        cut = complete(model, tokenizer, [prompt], max_new_tokens=12, until=[stop])[0].text
    finally:
        model.base_model.forward = forward
    assert cut == whole[: whole.index(stop)]
    assert len(steps) < 12


@pytest.mark.parametrize("blank", ["", " ", "\n", "\n\n", " \n\t\n"])
@pytest.mark.parametrize("stop", ["\n", "\n\n", "\nQuestion:", "Question:"])
def test_white_space_before_an_answer_does_not_end_it_and_a_stop_text_behind_it_does(stop, blank, routed):
    model, tokenizer = routed
    for answer in ("", "7"):
        ids = tokenizer(f"{blank}{answer}{stop} more", add_special_tokens=False)["input_ids"]

        def decoder(prompts, experts, *, ended, **options):
            return [ids[: next((n for n in range(1, len(ids)) if ended(ids[:n])), len(ids))] for _ in prompts]  # noqa: B023

        (said,) = complete(model, tokenizer, [[5, 6]], max_new_tokens=99, until=[stop], decoder=decoder)
        assert said.text == blank + (answer if answer or stop.strip() else f"{stop} more")


def test_an_answer_has_the_spaces_that_its_tokens_have(routed):
    """A tokenizer that is configured to remove spaces before punctuation would spoil verbatim answers."""
    model, _ = routed
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in "▁ ▁it ▁' ' s ▁s , ▁, . ▁.".split())]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)), clean_up_tokenization_spaces=True
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁")
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace("▁")
    ids = tokenizer("it , it 's .")["input_ids"]
    decoder = lambda prompts, experts, **options: [ids] * len(prompts)  # noqa: E731
    (said,) = complete(model, tokenizer, [[5, 6]], max_new_tokens=9, decoder=decoder)
    assert said.text == "it , it 's ."


SAYING = "{% for m in messages %}<{{ m.role }}>{{ LEAD if m.role == 'assistant' }}{{ m.content }}\n{% endfor %}"
SAYING += "{% if add_generation_prompt %}<assistant>{{ ASKED }}{% endif %}"
LEADS = {  # what a template puts before an answer, and how much of it stands in the prompt already
    "none": ("", ""),
    "Qwen3": ("<think>\n\n</think>\n\n", ""),
    "Qwen3.5": ("<think>\n\n</think>\n\n", "<think>\n"),
    "GLM": ("\n<think></think>\n", ""),
}


@pytest.mark.parametrize("task", ["mrqa/drop", "trec", "gsm8k", "own.jsonl"])
@pytest.mark.parametrize("thoughts", ["", "number?\nNo, no location.\n\n#### 7 or 8\n"])
@pytest.mark.parametrize("lead", LEADS)
def test_a_model_that_says_what_it_was_taught_is_right_in_a_template_that_writes_reasoning(
    lead, thoughts, task, routed, monkeypatch
):
    model, tokenizer = routed
    whole, asked = LEADS[lead]
    monkeypatch.setattr(tokenizer, "chat_template", SAYING.replace("LEAD", repr(whole)).replace("ASKED", repr(asked)))
    answer = {"trec": "human", "gsm8k": "18"}.get(task, "He.")
    example = Example("1", "Who?", f" {answer}", (answer,), task)
    said = completion_text(example, tokenizer, chat=True).removesuffix("\n")
    assert said == whole.removeprefix(asked) + answer
    if thoughts and lead != "none":
        said = whole.replace("</think>", thoughts + "</think>").removeprefix(asked) + answer
    ids = tokenizer(said + "\nQuestion: More? human 7", add_special_tokens=False)["input_ids"]

    def decoder(prompts, experts, *, ended, **options):
        return [ids[: next((n for n in range(1, len(ids)) if ended(ids[:n])), len(ids))] for _ in prompts]

    monkeypatch.setattr("ptmoe.evaluate.evaluation.Decoder", lambda model: decoder)
    if not task_named(task).until:
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    evaluation = evaluate(model, tokenizer, [example], chat=True)
    assert set(evaluation.predictions[0].scores.values()) == {1.0}, evaluation.predictions
    assert evaluation.predictions[0].completion.strip() == said.strip()
    assert evaluation.summary().no_label == 0
    texts = {"1": evaluation.predictions[0].completion}
    assert ptmoe.score(task, texts, [example]) == evaluation.metrics


def test_reasoning_that_one_prompt_begins_belongs_to_its_answer_in_every_batch(routed):
    """As where a line's `chat_template_kwargs` decide whether a template begins it."""
    model, tokenizer = routed
    ids = tokenizer("Seven?\nNo.</think>\n18\nMore.", add_special_tokens=False)["input_ids"]

    def decoder(prompts, experts, *, ended, **options):
        return [ids[: next((n for n in range(1, len(ids)) if ended(ids[:n])), len(ids))] for _ in prompts]

    prompts = [tokenizer(text)["input_ids"] for text in ("Who? <think>\n", "Who?", "Why?", "Why? <think>\n")]
    answers = ["Seven?\nNo.</think>\n18", "Seven?", "Seven?", "Seven?\nNo.</think>\n18"]
    options = {"max_new_tokens": 99, "until": ["\n"], "decoder": decoder}
    for rows in ([0], [1], [0, 1], [1, 0], [2, 3, 1, 0]):
        said = complete(model, tokenizer, [prompts[row] for row in rows], **options)
        assert [completion.text for completion in said] == [answers[row] for row in rows]


def test_reasoning_that_is_a_part_of_the_reference_is_graded():
    example = Example("1", "Who?", "<think>a</think>b", ("<think>a</think>b",), "own.jsonl")
    verdicts = [ptmoe.score("own.jsonl", [text], [example])["accuracy"] for text in ("<think>a</think>b", "b")]
    assert verdicts == [100.0, 0.0]


def test_greedy_means_greedy_whatever_the_bases_generation_config_asks_for(routed, examples):
    model, tokenizer = routed
    prompts = [tokenizer(example.input)["input_ids"] for example in examples[:12]]
    plain = complete(model, tokenizer, prompts, max_new_tokens=8)
    config = model.base_model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature = 5.0, True, 3.0
    try:
        assert complete(model, tokenizer, prompts, max_new_tokens=8) == plain
    finally:
        config.repetition_penalty, config.do_sample, config.temperature = None, None, None


def test_a_base_without_an_adapter_is_evaluated_as_itself(examples):
    base, tokenizer = load_base("nano")
    alone = evaluate(PromptedCausalLM(base), tokenizer, examples[:20], max_new_tokens=6)
    with_adapter = attach(base, ptmoe.PTConfig(num_virtual_tokens=4))
    with with_adapter.disable_adapter():
        disabled = evaluate(with_adapter, tokenizer, examples[:20], max_new_tokens=6)
    assert alone.predictions == disabled.predictions
    assert all(prediction.gate is None for prediction in alone.predictions)


def test_bad_limits_and_no_examples_are_refused(routed, examples):
    with pytest.raises(ptmoe.PtmoeError, match="no examples"):
        evaluated(routed, [], None)
    with pytest.raises(ptmoe.PtmoeError, match="max_new_tokens=3000 leaves no room"):
        evaluated(routed, examples, None, max_new_tokens=3000)
    for limit in ("max_new_tokens", "max_length"):
        for least in (0, -1):
            with pytest.raises(ptmoe.PtmoeError, match=f"{limit}={least}: needs at least 1"):
                evaluated(routed, examples, None, **{limit: least})


def test_the_interval_is_the_binomials_for_marks_and_does_not_depend_on_their_order():
    def bootstrap(marks):
        return bootstrap_interval([Group(1.0, 100 * np.array(marks))])

    marks = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap(marks)
    assert 20 <= low <= 23
    assert 37 <= high <= 40
    shuffled = random.Random(0).sample(marks, 100)
    assert bootstrap(shuffled) == (low, high)
    assert bootstrap([1.0] * 5) == (100.0, 100.0)


def test_what_a_template_leaves_out_is_refused_in_an_evaluation_too(routed):
    model, tokenizer = routed
    template, tokenizer.chat_template = tokenizer.chat_template, "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    given = {"tools": [{"name": "adder"}], "documents": [{"text": "7"}], "chat_template_kwargs": {"level": "high"}}
    try:
        for part, value in given.items():
            asked = Example("1", "", "4", ("4",), "t", messages=({"role": "user", "content": "2?"},), place="d.jsonl:1")
            evaluate(model, tokenizer, [asked], task=task_named("gsm8k"), max_new_tokens=2)
            with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:1: the chat template leaves out '\w+'"):
                evaluate(model, tokenizer, [replace(asked, template={part: value})], task=task_named("gsm8k"))
    finally:
        tokenizer.chat_template = template
