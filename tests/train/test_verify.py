"""`ptmoe verify` repeats what a run folder records: nothing that was changed in one passes, and what was not does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptmoe.train import TrainOptions, train
from ptmoe.train.verify import verify

TINY = {"max_steps": 2, "per_device_train_batch_size": 4, "max_examples": 8, "eval_examples": 6, "seed": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "run"
    method = {"name": "pt-moe", "num_virtual_tokens": 4, "num_experts": 2, "rank": 2}
    train(TrainOptions(task="nano/mixed", method=method, output_dir=str(folder), **TINY), say=lambda _: None)
    return folder


def rewritten(pattern, change):
    def rewrite(folder):
        (path,) = folder.glob(pattern)
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        first = json.loads(lines[0])
        change(first)
        path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")

    return rewrite


def another_adapter(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["B"] += torch.ones_like(tensors["B"])
    save_file(tensors, path)


CHANGES = {
    "accuracy": rewritten("eval/*.json", lambda record: record["metrics"].update(accuracy=99.5)),
    "equal completion": rewritten("predictions/*.jsonl", lambda line: line.update(completion="something else")),
    "equal scores": rewritten("predictions/*.jsonl", lambda line: line.update(scores={"accuracy": 0.25})),
    "training data": rewritten("environment.json", lambda record: record.update(data="0123456789abcdef")),
    "nano/mixed: adapter": another_adapter,
    "nano/mixed: data": rewritten("eval/*.json", lambda record: record["settings"].update(data="0123456789abcdef")),
    "trained on another base": rewritten(
        "adapter/adapter_config.json", lambda config: config["embedding_fingerprint"].update(values=[0.5] * 64)
    ),
    "1 of its 6 examples": rewritten("predictions/*.jsonl", lambda line: line.update(id="another")),
}


@pytest.mark.ci
def test_an_untouched_run_is_as_recorded_and_stays_so(trained, run):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    status, printed, error = run("verify", trained)
    assert (status, error) == (0, "")
    assert f"{trained} is as recorded" in printed
    assert "differs" not in printed
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.ci
def test_what_was_changed_is_named(what, trained, tmp_path, run):
    folder = shutil.copytree(trained, tmp_path / "run")
    CHANGES[what](folder)
    status, printed, _ = run("verify", folder)
    assert status == 1
    (line,) = [line for line in printed.splitlines() if what in line]
    assert "differs" in line


@pytest.mark.ci
def test_bad_records_that_the_evaluation_left_out_change_nothing_and_one_that_turned_bad_is_named(
    trained, tmp_path, run
):
    folder, data = shutil.copytree(trained, tmp_path / "run"), tmp_path / "mine.jsonl"
    lines = [json.dumps({"id": name, "prompt": name, "completion": "x"}) for name in "abc"]
    data.write_text("\n".join([lines[0], '{"input": 5}', *lines[1:]]) + "\n")
    assert run("eval", folder, "--task", data, "--skip-bad")[0] == 0
    status, printed, _ = run("verify", folder)
    assert status == 0, printed
    data.write_text("\n".join([*lines[:2], "{"]) + "\n")
    status, printed, _ = run("verify", folder)
    assert status == 1
    told = "".join(line.split("│")[3].strip() + " " for line in printed.splitlines() if line.count("│") > 3)
    assert "1 of its 3 examples are not in the data any more; 1 bad record(s)" in told


@pytest.mark.parametrize(
    "asked",
    [
        {"task": "gsm8k,nano/mixed", "data_dir": "data", "validation_examples": 4},
        {"task": "gsm8k", "data_dir": "data/train.jsonl", "validation_examples": 4},
        {"task": "nano/mixed", "eval_task": "a/test.jsonl,b/test.jsonl"},
        {"data": "data/mine.jsonl", "validation_examples": 2},
        {"data": "data/mine.jsonl", "eval_task": "data/mine.jsonl,nano/words"},
        {"task": "data/mine.jsonl", "eval_task": "gsm8k", "eval_data_dir": "data"},
    ],
    ids=lambda asked: ",".join(map(str, asked.values())),
)
@pytest.mark.ci
def test_what_the_training_was_evaluated_on_is_found_again(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, keys in (
        ("data/train", "question answer"),
        ("data/test", "question answer"),
        ("data/mine", "prompt completion"),
        ("a/test", "prompt completion"),
        ("b/test", "prompt completion"),
    ):
        Path(file).parent.mkdir(exist_ok=True)
        lines = [dict(zip(keys.split(), (f"{file} {n} and 1?", f"#### {n + 1}"), strict=True)) for n in range(12)]
        Path(f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    method = {"name": "pt", "num_virtual_tokens": 2}
    options = TrainOptions(method=method, output_dir="run", max_new_tokens=4, **{**TINY, "max_examples": 4}, **asked)
    train(options, say=lambda _: None)
    differing = [check for check in verify("run", say=lambda _: None) if not check.equal]
    assert differing == []
    if place := next((asked[name] for name in ("data_dir", "data", "eval_data_dir") if name in asked), None):
        Path("data").rename("moved")
        checks = verify("run", data_dir=place.replace("data", "moved"), say=lambda _: None)
        assert [check for check in checks if not check.equal] == []


@pytest.mark.ci
def test_what_a_command_evaluated_later_is_found_again(trained, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    for folder in "ab":
        Path(folder).mkdir()
        lines = [{"prompt": f"{folder} {n} =>", "completion": f" {n}"} for n in range(4)]
        Path(f"{folder}/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for tasks in ("a/test.jsonl", "a/test.jsonl,b/test.jsonl", "nano/words"):
        status, _, error = run("eval", "run", "--task", tasks, "--examples", "4", "--max-new-tokens", "4")
        assert status == 0, error
    checks = verify("run", say=lambda _: None)
    assert [check for check in checks if not check.equal] == []
    assert {check.what.partition(":")[0] for check in checks if check.what.endswith(": accuracy")} == {
        *("nano/mixed", "nano/words", "a/test.jsonl", "a__test", "b__test")
    }


@pytest.mark.ci
def test_other_versions_are_told_and_decide_nothing(trained, tmp_path, run):
    folder = shutil.copytree(trained, tmp_path / "run")
    rewritten("environment.json", lambda record: record["versions"].update(torch="0.1"))(folder)
    status, printed, _ = run("verify", folder)
    assert status == 0
    (line,) = [line for line in printed.splitlines() if "version of torch" in line]
    assert "differs, which decides nothing" in line


@pytest.mark.ci
def test_each_cell_of_a_comparison_is_verified(tmp_path, run):
    options = ["--max-steps", "2", "--max-examples", "8", "--eval-examples", "6", "--jobs", "1", "--seeds", "1"]
    methods = ["--method", "base", "--method", "pt:num_virtual_tokens=4"]
    status, _, error = run("compare", "--task", "nano/mixed", *methods, *options, "--output-dir", tmp_path / "both")
    assert status == 0, error
    status, printed, _ = run("verify", tmp_path / "both")
    assert status == 0
    assert "2 of 2 cells are as recorded" in printed
    (cell,) = (tmp_path / "both").glob("cells/pt/*/*")
    CHANGES["accuracy"](cell)
    status, printed, _ = run("verify", tmp_path / "both")
    assert status == 1
    assert f"{cell} differs" in printed
    assert "1 of 2 cells are as recorded" in printed
