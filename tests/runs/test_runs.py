"""Run folders: what is written is what is read, and what cannot be read is named."""

import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ptmoe.errors import PtmoeError
from ptmoe.runs.environment import peak_memory
from ptmoe.runs.folders import distinct_tasks, evaluation_file, is_run, read_run
from ptmoe.runs.predictions import PredictionsFile, read_predictions
from ptmoe.runs.records import Environment, EvaluationSummary, LogLine, Prediction, RoutingSummary, write_lines
from testing.folders import ALL_ON_SECOND, DOMAINS, ENVIRONMENT, ONE_EACH, write_run

TASK = "nano/mixed"


def test_files_of_one_folder_keep_their_results_apart(tmp_path):
    names = [
        str(tmp_path / name) for name in ("data.jsonl", "data.v1.jsonl", "data.v2.jsonl", ".data.jsonl", "data.v2.x")
    ]
    for name in names:
        Path(name).touch()
    assert evaluation_file(tmp_path, names[0]).name == "data.json"
    assert len({evaluation_file(tmp_path, name).name for name in names}) == len(names)
    assert [task.name for task in distinct_tasks(names).values()] == names


def test_what_an_interruption_has_left_of_the_last_line_is_not_read(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", [LogLine(step=step, loss=1.5) for step in range(3)]
    write_lines(path, lines)
    whole, last = path.read_bytes(), lines[-1].line().encode()
    for cut in range(2, len(last)):
        path.write_bytes(whole[:-cut])
        assert LogLine.read_lines(path) == lines[:2]
    path.write_bytes(whole.replace(b'"step": 1', b'"step": '))
    with pytest.raises(PtmoeError, match="line 2"):
        LogLine.read_lines(path)


def test_everything_that_is_written_is_read_again(tmp_path):
    words = [[[["sea", 0.8], [" port", 0.7]]] * 10] * 4
    run = read_run(write_run(tmp_path / "a", use=ONE_EACH, nearest=words, fields={"rank": 3}))
    assert run.config["method"] == {"name": "pt-moe", "rank": 3}
    assert (run.result.steps, run.result.trainable_parameters) == (200, 3764)
    assert run.environment == ENVIRONMENT
    assert [log.step for log in run.logs] == list(range(10, 201, 10))
    assert run.logs[0].epoch == 0.5, "what transformers logs beside our own is kept"
    summary = run.evaluations[TASK]
    predictions = read_predictions(run.predictions[TASK])
    assert summary.metrics["accuracy"] == pytest.approx(
        100 * np.mean([each.scores["accuracy"] for each in predictions])
    )
    for domain, part in summary.by_domain.items():
        scores = [each.scores["accuracy"] for each in predictions if each.domain == domain]
        assert part == {"examples": len(scores), "accuracy": pytest.approx(100 * np.mean(scores))}
    assert summary.mean_of_domains["accuracy"] == pytest.approx(
        np.mean([part["accuracy"] for part in summary.by_domain.values()])
    )
    assert summary.routing.use["harbor"] == ONE_EACH[0]
    assert run.nearest.experts[0][0] == [("sea", 0.8), (" port", 0.7)]


@pytest.mark.parametrize("metric", ["accuracy", "f1", "rouge_l"])
def test_a_task_with_domains_may_have_any_metric(tmp_path, metric):
    summary = read_run(write_run(tmp_path / "a", metric=metric)).evaluations[TASK]
    assert summary.metric == metric
    assert all(part[metric] <= 100 for part in summary.by_domain.values())
    assert list(summary.by_domain) == sorted(DOMAINS)


def test_an_evaluation_on_another_split_does_not_hide_that_on_test(tmp_path):
    write_run(tmp_path / "a", skill=0.9)
    write_run(tmp_path / "b", skill=0.1, split="validation")
    for kind in ("eval", "predictions"):
        for path in (tmp_path / "b" / kind).iterdir():
            path.rename(tmp_path / "a" / kind / path.name)
    run = read_run(tmp_path / "a")
    assert set(run.evaluations) == {TASK, f"{TASK}, validation"}
    assert run.evaluations[TASK].score > run.evaluations[f"{TASK}, validation"].score
    assert run.predictions[f"{TASK}, validation"].is_file()


def test_the_paths_that_made_a_run_fast_are_recorded(tmp_path):
    ENVIRONMENT.model_copy(update={"fast_paths": {"packing": None, "linear": "no AVX-512"}}).write(tmp_path / "e.json")
    assert Environment.read(tmp_path / "e.json").fast_paths == {"packing": None, "linear": "no AVX-512"}


def test_a_folder_without_the_newer_keys_is_read_with_their_defaults(tmp_path):
    folder = write_run(tmp_path / "a", use=ONE_EACH)
    for name, keys in {
        "environment.json": ["fast_paths"],
        "eval/nano__mixed.json": ["cut", "unanswered", "settings"],
    }.items():
        written = json.loads((folder / name).read_text())
        for key in keys:
            del written[key]
        written.get("routing", {}).pop("soft_gate", None)
        (folder / name).write_text(json.dumps({**written, "a_later_key": 1}))
    run = read_run(folder)
    assert run.environment.fast_paths is None
    assert (run.evaluations[TASK].cut, run.evaluations[TASK].settings) == (0, {})


def test_a_training_resumed_keeps_the_lines_of_its_log(tmp_path):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ptmoe.train.callbacks import MetricsFile

    arguments, control = TrainingArguments(str(tmp_path / "c"), report_to="none"), TrainerControl()
    path = tmp_path / "metrics.jsonl"
    state = TrainerState(is_world_process_zero=True)
    first = MetricsFile(path)
    first.on_train_begin(arguments, state, control)
    for state.global_step in (10, 20):
        first.on_log(arguments, state, control, {"loss": 1.5, "epoch": 0.1, "expert_use": [0.5, 0.5]})
    again = MetricsFile(path)
    state.global_step = 10
    again.on_train_begin(arguments, state, control)
    state.global_step = 20
    again.on_log(arguments, state, control, {"loss": float("nan")})
    lines = LogLine.read_lines(path)
    assert [line.step for line in lines] == [10, 20]
    assert lines[0].expert_use == [0.5, 0.5]
    assert np.isnan(lines[1].loss)
    assert "loss" not in json.loads(LogLine(step=1).line()), "what was not logged is not written"


def test_a_prediction_may_hold_what_has_no_utf_8(tmp_path):
    odd = Prediction("1", "é", "a lone \ud83d surrogate\n\u2028", ["ü"], {"accuracy": 1.0})
    file = PredictionsFile(tmp_path / "t.jsonl", {}, ["1"])
    file.resume()
    file.append([odd])
    assert PredictionsFile(tmp_path / "t.jsonl", {}, ["1"]).resume() == read_predictions(tmp_path / "t.jsonl") == [odd]


def test_predictions_that_are_missing_damaged_or_repeated_are_named(tmp_path):
    path = tmp_path / "t.jsonl"
    line = Prediction("1", "?", "!", [], {"accuracy": 1.0}).line()
    for content, named in {b"": "0 line", line + line: "2 line", line + b"{}\n": "line 2 is no prediction"}.items():
        path.write_bytes(content)
        with pytest.raises(PtmoeError, match=named):
            read_predictions(path)
    with pytest.raises(PtmoeError, match="is missing"):
        read_predictions(tmp_path / "none.jsonl")


# Damage


@pytest.mark.parametrize("missing", ["result.json", "config.yaml", "environment.json"])
def test_a_missing_file_is_named(tmp_path, missing):
    folder = write_run(tmp_path / "a")
    assert is_run(folder)
    (folder / missing).unlink()
    assert not is_run(folder)
    with pytest.raises(PtmoeError, match=re.escape(str(folder / missing))):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "result.json",
            '{"name": "a", "method": "pt", "train_seconds": 1, "steps": 2}',
            "trainable_parameters is missing .if an earlier version of ptmoe wrote it, evaluate or train again",
        ),
        ("result.json", "{", "JSON"),
        ("config.yaml", "seed: 1", "method.name is missing"),
        ("config.yaml", "a: [", "not YAML"),
        ("metrics.jsonl", '{"step": 1}\n{"step": "many"}', "line 2: step"),
        ("eval/nano__mixed.json", '{"task": "t", "examples": 1, "metrics": {}}', "metrics has no accuracy"),
        (
            "eval/nano__mixed.json",
            '{"task": "t", "examples": 1, "metrics": {"accuracy": 1}, "by_domain": {"d": {"accuracy": 1}}}',
            "by_domain.d has no examples",
        ),
        ("inspect/nearest.json", '{"experts": [[], [[]]]}', "experts differ in their number of virtual tokens"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name, content, said):
    folder = write_run(tmp_path / "a")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(PtmoeError, match=said) as caught:
        read_run(folder)
    assert str(folder / name) in str(caught.value)


def test_routing_of_the_wrong_size_is_refused(tmp_path):
    folder = write_run(tmp_path / "a", use=ONE_EACH)
    path = folder / "eval" / "nano__mixed.json"
    path.write_text(path.read_text().replace('"num_experts": 4', '"num_experts": 3'))
    with pytest.raises(PtmoeError, match="num_experts=3"):
        read_run(folder)


# Collapse


def summary_of(tmp_path, **options):
    return read_run(write_run(tmp_path / "run", **options)).evaluations[TASK]


@pytest.mark.parametrize(
    ("sizes", "collapsed"), [([330, 330, 330, 10], 0), ([10, 10, 10, 970], 1), ([25, 25, 25, 25], None)]
)
def test_a_collapse_is_judged_over_inputs_and_not_over_domains(tmp_path, sizes, collapsed):
    use = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert summary_of(tmp_path, use=use, sizes=sizes).collapsed_expert == collapsed


def test_one_expert_alone_cannot_collapse(tmp_path):
    assert summary_of(tmp_path, use=[[1.0]] * 4).collapsed_expert is None


def test_inputs_without_a_domain_count(tmp_path):
    summary = summary_of(tmp_path, domains=("", "harbor"), sizes=[30, 10], use=[[1.0, 0.0], [0.0, 1.0]])
    assert summary.overall_shares == [0.75, 0.25]


@pytest.mark.parametrize("method", ["attempt", "pt-moe", "a method to come"])
def test_a_gate_that_mixes_all_experts_is_judged_by_its_weights_whatever_the_method(tmp_path, method):
    gates = [[0.51, 0.49]] * 4
    soft = summary_of(tmp_path, method=method, gates=gates)
    assert soft.routing.use["harbor"] == [1.0, 0.0]
    assert soft.overall_shares == pytest.approx([0.51, 0.49])
    assert soft.collapsed_expert is None


@pytest.mark.parametrize(
    ("mean_gate", "soft"), [([0.6, 0.4], True), ([1.0, 1.0], True), ([0.7, 0.0], False), ([1.0, 0.0], False)]
)
def test_a_folder_that_does_not_say_whether_its_gate_is_soft_is_judged_by_its_gates(mean_gate, soft):
    routing = RoutingSummary(
        num_experts=2, use={"": [1.0, 0.0]}, mean_gate={"": mean_gate}, entropy=0.0, mutual_information=0.0
    )
    assert routing.is_soft is soft
    assert routing.model_copy(update={"soft_gate": not soft}).is_soft is not soft


def test_the_writer_knows_which_gates_are_soft():
    from ptmoe.methods import METHODS, PTMoEConfig

    assert not PTMoEConfig().soft_gate
    assert PTMoEConfig(selective=False).soft_gate
    assert METHODS["attempt"]().soft_gate
    assert not METHODS["smop"]().soft_gate


def test_a_collapse_is_found_with_a_hard_gate(tmp_path):
    summary = summary_of(tmp_path, use=ALL_ON_SECOND, examples=80)
    assert summary.overall_shares[1] == pytest.approx(0.975)
    assert summary.collapsed_expert == 1


def test_records_are_written_whole(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "a")
    path = folder / "eval" / "nano__mixed.json"
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        EvaluationSummary.read(path).model_copy(update={"examples": 1}).write(path)
    with pytest.raises(KeyboardInterrupt):
        write_lines(folder / "metrics.jsonl", [])
    monkeypatch.undo()
    assert path.read_text() == before
    assert len(read_run(folder).logs) == 20
    assert not list(folder.rglob("*.part"))


def test_the_config_of_a_run_is_yaml_that_a_training_repeats(tmp_path):
    from ptmoe.train import TrainOptions

    folder = write_run(tmp_path / "a", fields={"rank": 3})
    assert TrainOptions.read(folder / "config.yaml").method == {"name": "pt-moe", "rank": 3}
    assert yaml.safe_load((folder / "config.yaml").read_text())["task"] == TASK


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or torch.cuda.is_available() or peak_memory()() is None,
    reason="of glibc's heap, where the system says its peak",
)
def test_the_peak_of_a_run_leaves_out_what_an_earlier_one_freed():
    earlier = [bytearray(100_000) for _ in range(3_000)]  # small enough for the heap
    at_its_end = bytearray(100_000)
    with_all = peak_memory()()
    del earlier
    assert peak_memory()() < with_all - 200_000_000
    assert len(at_its_end) == 100_000, "the heap cannot shrink from its end"
