"""Searches: what is drawn, what a trial trains on and is scored on, and that an interrupted one continues."""

import json
import signal
import time
from importlib.util import find_spec

import pytest
import yaml

from ptmoe.compare import ray_session, tuning
from ptmoe.compare.search import TunePlan, drawn, read_plan, resolved
from ptmoe.compare.tuning import best_of, tune
from ptmoe.errors import PtmoeError
from ptmoe.runs.records import write_lines
from ptmoe.runs.searches import TrialRecord
from ptmoe.tasks import load_task
from ptmoe.train.examples import evaluation_examples, evaluation_split, examples_fingerprint
from ptmoe.train.options import TrainOptions
from testing.commands import alive, descendants, started

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ptmoe[ray]'")
SMALL = {
    "task": "nano/mixed",
    "method": "pt:num_virtual_tokens=4",
    "max_steps": 6,
    "max_examples": 24,
    "validation_examples": 8,
    "per_device_train_batch_size": 4,
    "evaluations": 3,
    "trials": 4,
    "jobs": 2,
}


def plan(**changes):
    return TunePlan(**{**SMALL, **changes})


@pytest.fixture
def with_ray(monkeypatch):
    real = ray_session.importlib.util.find_spec
    found = lambda name, *package: object() if name == "ray" else real(name, *package)  # noqa: E731
    monkeypatch.setattr(ray_session.importlib.util, "find_spec", found)


def test_the_first_trial_is_the_training_as_given_and_the_others_follow_from_the_seed(with_ray):
    asked = resolved(plan(method="pt-moe:rank=8,num_virtual_tokens=10", trials=60))
    assert asked.search.keys() == {"learning_rate", "router_noise", "rank"}
    settings = drawn(asked)
    assert settings[0] == {}
    assert settings == drawn(asked) != drawn(asked.replace(seed=1))
    usual = asked.learning_rate
    rates = [each["learning_rate"] for each in settings[1:]]
    assert all(usual / 10.1 <= rate <= usual * 10.1 for rate in rates)
    assert sum(rate < usual for rate in rates) > 15, "by the logarithm"
    assert {each["rank"] for each in settings[1:]} == {2, 4, 8}
    assert drawn(asked)[:5] == drawn(asked.replace(trials=5)), "more trials add to those that there are"
    options = asked.trial(settings[7])
    assert type(options) is TrainOptions
    assert options.learning_rate == settings[7]["learning_rate"]
    assert options.method["rank"] == settings[7]["rank"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("rank=4,8", [4, 8]),
        ("rank=2..5", "2..5"),
        ("learning_rate=1e-3..0.1", "1e-3..0.1"),
        ("warmup_steps=5", [5]),
    ],
)
def test_a_search_is_read_as_people_write_it(text, values):
    field = text.partition("=")[0]
    assert plan(search=[text]).search == plan(search={field: values}).search == {field: values}


def test_whole_ends_of_a_field_with_fractions_give_those_between(with_ray):
    asked = resolved(plan(method="pt-moe", search=["router_noise=0..1", "weight_decay=0..2"], trials=30))
    for field, high in (("router_noise", 1), ("weight_decay", 2)):
        found = {each[field] for each in drawn(asked)[1:]}
        assert len(found) > 10, "and not the ends alone"
        assert all(0 <= value <= high for value in found)


def test_whole_ends_give_whole_numbers_and_every_one_of_them(with_ray):
    asked = resolved(plan(method="dpt:rank=3,num_virtual_tokens=9", search=["rank=2..5"], trials=80))
    assert {each.get("rank") for each in drawn(asked)} == {None, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": ["rank"]}, "search 'rank': needs FIELD=LOW..HIGH or FIELD=VALUE,VALUE"),
        ({"search": ["rank=1,2", "rank=4"]}, "search: a field is given twice"),
        ({"search": ["rank=5..2"]}, "search rank=5..2: needs two numbers, the lower one first"),
        ({"search": ["rank=1,2"]}, "search: pt has no 'rank' to vary"),
        ({"search": ["task=a,b"]}, "search: pt has no 'task' to vary"),
        ({"search": ["data_dir=a,b"]}, "search: pt has no 'data_dir' to vary"),
        ({"search": ["learning_rate=-1,2"]}, "learning_rate=-1"),
        ({"optim": "adamw"}, "optim='adamw': no such optimizer"),
        ({"search": ["optim=sgd,adamw"]}, "optim='adamw': no such optimizer"),
        ({"search": ["lr_scheduler_type=linear,linaer"]}, "linaer is not a valid SchedulerType"),
        ({"trainer": {"dataloader_num_workers": -1}}, "transformers refuses these options: num_workers"),
        ({"on": "ray://auto", "report_to": "wandb", "optim": "adamw"}, "optim='adamw': no such optimizer"),
        ({"on": "ray://head:10001"}, "a search runs on ray, or with ray://auto"),
        ({"on": "processes"}, "a search runs on ray, or with ray://auto"),
    ],
)
def test_a_mistake_is_refused_before_a_trial(changes, message, with_ray):
    with pytest.raises(PtmoeError, match=message.replace(".", r"\.")):
        resolved(plan(**changes))


def test_a_search_without_ray_is_refused_with_what_to_install(run, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_session.importlib.util, "find_spec", lambda name: None)
    status, _, err = run("tune", "--task", "nano/mixed", "--output-dir", tmp_path / "t")
    assert status == 2
    assert "--on ray needs Ray, which is not installed: pip install 'ptmoe[ray]'" in err
    assert not (tmp_path / "t").exists()


def test_a_trial_is_scored_on_validation_examples_and_the_best_trains_on_everything():
    trial, best = plan().trial({}), plan().trial({}, validation_examples=None)
    assert (evaluation_split(trial), evaluation_split(best)) == ("validation", "test")
    (scored,) = evaluation_examples(trial, print).values()
    assert scored == load_task("nano/mixed", "validation", max_examples=8)


def test_too_few_examples_are_refused_before_a_trial(with_ray, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1 =>", "completion": " 1"}\n' * 12)
    asked = resolved(plan(task=None, data=str(tmp_path / "mine.jsonl")))
    with pytest.raises(PtmoeError, match="12 examples, and 8 of them are to validate on: lower"):
        tune(asked, tmp_path / "search")
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize("line", [0, 30])
def test_a_search_does_not_go_on_with_other_data(line, with_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "session", lambda *_: pytest.fail("a trial was started"))
    file = tmp_path / "mine.jsonl"
    rows = [f'{{"prompt": "{number} =>", "completion": " {number}"}}\n' for number in range(40)]
    file.write_text("".join(rows))
    asked, folder = resolved(plan(task=None, data=str(file), trials=1)), tmp_path / "search"
    data = examples_fingerprint(asked.trial({}), print)
    folder.mkdir()
    asked.write(folder / "tune.yaml")
    record = TrialRecord(number=0, settings={}, scores=[(6, 50.0)], state="finished", data=data)
    write_lines(folder / "trials.jsonl", [record])
    assert tune(asked, folder) == [record]
    file = file.rename(tmp_path / "moved.jsonl")
    asked = resolved(plan(task=None, data=str(file), trials=1))
    assert tune(asked, folder) == [record]
    file.write_text("".join(row.replace("=>", "+") if place == line else row for place, row in enumerate(rows)))
    with pytest.raises(PtmoeError, match=r"holds a search on other data than .*moved.jsonl holds now"):
        tune(asked, folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 7),
        ("evaluations", 2),
        ("seed", 1),
        ("search", {"learning_rate": [0.1]}),
        ("method", "pt:num_virtual_tokens=8"),
    ],
)
@pytest.mark.parametrize("place", ["given", "edited"])
@pytest.mark.ci
def test_a_search_does_not_go_on_otherwise_than_it_began(name, value, place, with_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "session", lambda *_: pytest.fail("a trial was started"))
    asked, folder = resolved(plan(trials=1)), tmp_path / "search"
    folder.mkdir()
    asked.write(folder / "tune.yaml")
    began = tuning._settled(asked)
    record = TrialRecord(number=0, settings={}, scores=[(6, 50.0)], state="finished", plan=began)
    write_lines(folder / "trials.jsonl", [record])
    assert tune(resolved(read_plan(folder, {"jobs": 1})), folder) == [record]
    changes = {name: value}
    if place == "edited":
        read_plan(folder, changes).write(folder / "tune.yaml")
        changes = {}
    with pytest.raises(PtmoeError, match=f"holds another search .*{name} was "):
        tune(resolved(read_plan(folder, changes)), folder)


def test_the_best_came_furthest_and_then_scores_highest():
    def record(number, *scores):
        return TrialRecord(number=number, settings={}, scores=list(enumerate(scores)), state="stopped")

    assert best_of([record(0, 90), record(1, 10, 20), record(2, 10, 30), record(3, 5, 30)]).number == 2
    short = record(4, 80).model_copy(update={"state": "finished"})
    assert best_of([record(2, 10, 30), short]).number == 4, "it has fewer steps, and took all of them"


@needs_ray
@pytest.mark.slow
def test_a_search_stops_what_falls_behind_reports_and_is_not_run_twice(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "search"
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": one.input, "completion": one.target} for one in load_task("nano/mixed", "train")[:300]]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    written = {**SMALL, "search": {"learning_rate": [1e-9, 0.03]}, "max_steps": 6, "max_examples": 200}
    written |= {"task": None, "data": "rows.jsonl"}  # a path starts where the command does
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(written))
    status, out, err = run("tune", tmp_path / "plan.yaml", "--output-dir", folder)
    assert status == 0, err
    records = TrialRecord.read_lines(folder / "trials.jsonl")
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert all(record.state in ("finished", "stopped") for record in records)
    assert any(record.state == "finished" for record in records)
    whole = [[step for step, _ in record.scores] for record in records if record.state == "finished"]
    assert whole == [[2, 4, 6]] * len(whole)
    best = TrainOptions.read(folder / "best.yaml")
    assert best.max_examples == 200
    assert (best.learning_rate, best.method["num_virtual_tokens"]) == (
        best_of(records).settings.get("learning_rate", 0.03),
        4,
    )
    page = (folder / "report.html").read_text()
    assert "Every trial" in page
    assert (folder / "figures" / "score-by-step.png").exists()
    assert f"ptmoe train {folder / 'best.yaml'}" in out
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "best.yaml",
        "figures",
        "report.html",
        "tables",
        "trials.jsonl",
        "tune.yaml",
    ]
    assert not (folder / ".ray").exists(), "Ray's pickles"
    before = (folder / "trials.jsonl").read_bytes()
    monkeypatch.setattr(tuning, "session", None)
    assert run("tune", folder)[0] == 0
    assert (folder / "trials.jsonl").read_bytes() == before
    with pytest.raises(PtmoeError, match=r"another search \(max_steps was 6, is 7\): choose another --output-dir"):
        tune(resolved(read_plan(folder, {"max_steps": 7})), folder)
    (folder / "tune.yaml").write_text((folder / "tune.yaml").read_text().replace("max_steps: 6", "max_steps: 7"))
    with pytest.raises(PtmoeError, match=r"another search \(max_steps was 6, is 7\)"):
        tune(resolved(read_plan(folder, {})), folder)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_that_is_stopped_leaves_no_process_and_goes_on(tmp_path, number, run):
    folder = tmp_path / "search"
    options = ["--trials", "3", "--validation-examples", "8", "--max-examples", "64", "--evaluations", "2"]
    process, _ = started(folder, 1, *options, command="tune", sign="trials.jsonl")
    own = descendants(process.pid)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert b"continue with" in out
    deadline = time.monotonic() + 30
    while any(map(alive, own)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(filter(alive, own))
    finished = TrialRecord.read_lines(folder / "trials.jsonl")
    assert len(finished) < 3
    status, _, err = run("tune", folder)
    assert status == 0, err
    records = TrialRecord.read_lines(folder / "trials.jsonl")
    assert len(records) == 3
    assert all(record in records for record in finished), "what was finished is as it was"
