"""Reading data: every form of line, every bad line by file and number; nano's world; a new data set and metric."""

import gzip
import json
from pathlib import Path

import pytest

import ptmoe
from ptmoe.evaluate import evaluate
from ptmoe.nano.world import DOMAINS, SKILLS, WORLDS, is_test_input
from ptmoe.tasks import TASKS, load_task, nano, task_names
from ptmoe.tasks.base import Example, Format, Split, Task
from ptmoe.tasks.local import FORMS, Keys, load
from ptmoe.tasks.metrics import GRADERS
from ptmoe.tasks.problems import Problems
from ptmoe.tasks.records import text_of
from ptmoe.tasks.scoring import grading_task
from ptmoe.train import TrainOptions, train

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def written(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_each_form_is_recognised_by_its_keys(tmp_path):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    question = {"question": "Where?", "context": "In the box.", "answers": ["the box", "box"], "id": "q", "domain": "d"}
    path = written(tmp_path / "d.jsonl", {"prompt": "2 + 2 =", "completion": " 4"}, "", {"messages": chat}, question)
    plain, messages, question_answer = load(path)
    assert (plain.input, plain.target, plain.references, plain.id) == ("2 + 2 =", " 4", ("4",), "d-1")
    assert (messages.messages, messages.target, messages.id) == ((chat[0],), "4", "d-3")
    assert question_answer.input == "In the box.\n\nQuestion: Where?\nAnswer:"
    assert (question_answer.target, question_answer.references) == (" the box", ("the box", "box"))
    assert (question_answer.id, question_answer.domain) == ("q", "d")


@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_is_in_no_example_is_named_with_the_first_line_that_has_it(form, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    line = {key: turns if key == "messages" else "a" for key in FORMS[form]} | {"domain": "d"}
    written(tmp_path / "a.jsonl", line | {"system": "", "tools": []}, line | {"system": "Be brief.", "input": None})
    problems = Problems()
    assert len(load(tmp_path / "a.jsonl", problems=problems)) == 2
    assert problems.unread == {"system": f"{tmp_path / 'a.jsonl'}:2"}
    assert "'system'" in "".join(problems.notes())
    written(tmp_path / "a.jsonl", dict.fromkeys(("instruction", "input", "output"), "a"))
    problems = Problems()
    load(tmp_path / "a.jsonl", Keys("instruction", "output"), problems)
    assert list(problems.unread) == ["input"]


def test_other_keys_are_mapped_by_name(tmp_path):
    path = written(tmp_path / "d.jsonl", {"question": "How many?", "answer": 3})
    (example,) = load(path, Keys("question", "answer", "\n"))
    assert (example.input, example.target, example.references) == ("How many?\n", "3", ("3",))


def test_all_bad_lines_are_counted_and_the_first_are_named(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    bad = {
        '{"prompt": ': "not JSON",
        '["a"]': "a JSON list, needs an object",
        '{"prompt": "a"}': "lacks the key 'completion'",
        '{"prompt": "a", "completion": " "}': "'completion' is empty",
        '{"prompt": "", "completion": "b"}': "'prompt' is empty",
        '{"prompt": "a", "completion": ["b"]}': "'completion' is list, needs text",
        '{"text": "a"}': "has the keys 'text': needs prompt and completion, messages, or question and answers; rename",
        '{"question": "a"}': "lacks the key 'answers'",
        '{"question": "a", "answers": []}': "'answers' needs a list of one text or more",
        '{"messages": [{"role": "user", "content": "a"}]}': "'messages' must end with the assistant's answer",
        '{"messages": "hello"}': "'messages' needs a list",
    }
    for number, (line, reason) in enumerate(bad.items()):
        path = written(tmp_path / f"{number}.jsonl", good, line)
        with pytest.raises(ptmoe.PtmoeError) as error:
            load(path)
        assert f"{path}:2: {reason}" in str(error.value)
    path = written(tmp_path / "all.jsonl", good, *bad)
    with pytest.raises(ptmoe.PtmoeError, match=rf"{len(bad)} bad record\(s\)[\s\S]*and {len(bad) - 5} more"):
        load(path)


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff", "completion": "b"}\n')
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:1: not UTF-8"):
        load(tmp_path / "d.jsonl")


def test_an_id_used_twice_is_named(tmp_path):
    path = written(tmp_path / "d.jsonl", *[{"id": 7, "prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(ptmoe.PtmoeError, match=r"d.jsonl:2: id '7' was used before, at .*d.jsonl:1"):
        load(path)


def test_missing_and_empty_data_are_reported(tmp_path):
    with pytest.raises(ptmoe.PtmoeError, match="no data file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(ptmoe.PtmoeError, match="holds no example"):
        load(written(tmp_path / "empty.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ptmoe.PtmoeError, match=r"no \*\.jsonl or \*\.jsonl\.gz file"):
        load(tmp_path / "folder")
    with pytest.raises(ptmoe.PtmoeError, match="give both or neither"):
        load(tmp_path / "empty.jsonl", Keys(prompt="a"))


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.txt", "mine", "mine.v2.jsonl"])
def test_a_line_without_an_id_is_named_after_its_file(name, tmp_path):
    (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    assert [example.id for example in load(tmp_path / name)] == [f"{Path(name).stem}-1"]


@pytest.mark.parametrize("compressed", [(), (1,), (0, 1)])
def test_a_folder_is_read_whole_and_in_order_whichever_of_its_files_are_compressed(compressed, tmp_path):
    (tmp_path / "notes.txt").write_text("no data")
    for part in (1, 0):
        path = written(tmp_path / f"part-{part}.jsonl", *({"prompt": f"{part} {n}", "completion": "b"} for n in (1, 2)))
        if part in compressed:
            (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    examples = load(tmp_path)
    assert [example.id for example in examples] == ["part-0-1", "part-0-2", "part-1-1", "part-1-2"]
    assert [example.input for example in examples] == ["0 1", "0 2", "1 1", "1 2"]


def test_for_an_unknown_task_or_split_the_nearest_is_suggested():
    with pytest.raises(ptmoe.PtmoeError, match="unknown task 'nano/mixd'; did you mean 'nano/mixed'"):
        load_task("nano/mixd")
    with pytest.raises(ptmoe.PtmoeError, match="no split 'tset'; did you mean 'test'"):
        load_task("nano/mixed", "tset")


@pytest.mark.parametrize("task", nano.NAMES)
@pytest.mark.ci
def test_test_inputs_of_nano_are_in_no_training_set(task):
    def inputs(split):
        return {e.input.split(": ", 1)[1].removesuffix(" =>") for e in load_task(task, split)}

    assert all(is_test_input(text) for text in inputs("test") | inputs("validation"))
    assert not any(is_test_input(text) for text in inputs("train"))
    assert not {e.input for e in load_task(task, "test")} & {e.input for e in load_task(task, "validation")}


@pytest.mark.parametrize("world", WORLDS)
def test_in_a_world_the_domain_alone_decides_the_skill(world):
    examples = load_task(f"nano/{world}", "test")
    assert {e.domain for e in examples} == set(WORLDS[world])
    assert all(e.input.startswith(f"{e.domain}: ") for e in examples)
    assert set(WORLDS[world].values()) <= set(SKILLS)
    assert set(WORLDS[world]) <= set(DOMAINS)


def test_nanos_answers_are_right():
    for example in load_task("nano/mixed", "test"):
        first, second = map(int, example.input.split(": ")[1].removesuffix(" =>").split(" and "))
        wanted = {
            "harbor": f"{first + second}",
            "market": f"{second} and {first}",
            "garden": f"{max(first, second)}",
            "castle": f"{min(first, second)}",
        }
        assert example.references == (wanted[example.domain],)
        assert example.target == f" {wanted[example.domain]}"


def test_gold_answers_score_100_and_wrong_ones_0():
    examples = load_task("nano/words", "test")
    assert ptmoe.score("nano/words", [e.references[0] for e in examples], examples) == {"accuracy": 100.0}
    assert ptmoe.score("nano/words", {e.id: "?" for e in examples}, examples) == {"accuracy": 0.0}


@pytest.mark.parametrize("name", ["nano/mixed,gsm8k", "gsm8k,nano/mixed", "gsm8k=2,mrqa/squad=1", "glue/sst2,trec"])
def test_a_mixture_is_not_graded_as_its_first_task_where_the_others_are_graded_otherwise(name):
    examples = [Example(task, "?", " #### 18", ("18",), task, task) for task in task_names(name)]
    texts = ["#### 18"] * len(examples)
    for grading in (lambda: ptmoe.score(name, texts, examples), lambda: evaluate(None, None, examples)):
        with pytest.raises(ptmoe.PtmoeError, match="graded in different ways: score each by itself"):
            grading()


def test_a_mixture_whose_tasks_are_graded_alike_is_graded_under_its_own_name():
    examples = [Example(task, "?", " #### 18", ("18",), task, task) for task in ("gsm8k", "svamp")]
    assert ptmoe.score("gsm8k,svamp", ["#### 18", "17"], examples) == {"accuracy": 50.0}
    assert grading_task("gsm8k,svamp").name == "gsm8k,svamp"


def test_predictions_must_cover_exactly_the_examples():
    examples = load_task("nano/words", "test")[:3]
    with pytest.raises(ptmoe.PtmoeError, match="2 predictions for 3 examples"):
        ptmoe.score("nano/words", ["a", "b"], examples)
    with pytest.raises(ptmoe.PtmoeError, match=r"lack 2 id\(s\).*hold 1 unknown"):
        ptmoe.score("nano/words", {"test-0": "a", "x": "b"}, examples)


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's own file")
def test_gsm8k_loads_with_its_own_keys_mapped():
    examples = load(GSM8K, Keys("question", "answer", "\n"))
    assert len(examples) == 7473
    assert examples[0].input.endswith("in April and May?\n")
    assert examples[0].target.endswith("#### 72")


@pytest.mark.ci
def test_a_new_data_set_and_a_new_metric_are_known_by_their_registration_alone(tmp_path, monkeypatch):
    """As in docs/add-a-task.md: a function, a `Task` and an entry in `TASKS`; for a metric an entry in `GRADERS`."""

    def example(record, origin):
        fields = [text_of(record, key) for key in ("uid", "ask", "result", "kind")]
        return Example(fields[0], f"{fields[1]} =>", f" {fields[2]}", (fields[2],), origin.task, fields[3])

    def grade(prediction, references):
        return {"overlap": len({*prediction} & {*references[0]}) / len({*prediction} | {*references[0]})}

    task = Task(
        name="sums",
        splits={name: Split(20, (f"{name}.jsonl",)) for name in ("train", "test")},
        grader="characters",
        metric="overlap",
        max_new_tokens=4,
        formats=(Format("sums' JSON lines", "{", ("uid ask result",), example),),
    )
    monkeypatch.setitem(TASKS, "sums", task)
    monkeypatch.setitem(GRADERS, "characters", grade)
    sums = [{"uid": n, "ask": f"{n} and {n}", "result": 2 * n, "kind": ("even", "odd")[n % 2]} for n in range(1, 21)]
    for split in task.splits:
        written(tmp_path / f"{split}.jsonl", *sums)

    examples = load_task("sums", "test", tmp_path)
    assert (examples[2].id, examples[2].input, examples[2].references) == ("3", "3 and 3 =>", ("6",))
    assert ptmoe.score("sums", [example.references[0] for example in examples], examples) == {"overlap": 100.0}
    assert ptmoe.score("sums", ["12"] * 20, examples)["overlap"] < 100
    with pytest.raises(ptmoe.PtmoeError, match="looks like sums' JSON lines, and gsm8k needs GSM8K's JSON lines"):
        load_task("gsm8k", "test", tmp_path / "test.jsonl")

    options = TrainOptions(
        task="sums",
        eval_task="sums",
        data_dir=str(tmp_path),
        method={"name": "pt-moe"},
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=4,
        output_dir=str(tmp_path / "run"),
    )
    run = train(options, say=lambda _: None)
    summary = json.loads((run.folder / "eval" / "sums.json").read_text())
    assert summary["metric"] == "overlap"
    assert summary["metrics"].keys() == summary["interval"].keys() == {"overlap"}
    assert summary["by_domain"].keys() == {"even", "odd"}
    predicted = [json.loads(line) for line in (run.folder / "predictions" / "sums.jsonl").read_text().splitlines()]
    texts = {line["id"]: line["completion"] for line in predicted}
    assert ptmoe.score("sums", texts, examples) == pytest.approx(summary["metrics"])
