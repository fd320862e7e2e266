"""A run is resumed as it was, or refused by name; a run that is refused is left as it was to the bit."""

import html
import json
import re
import shutil
from contextlib import suppress

import pytest
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

import ptmoe
from ptmoe.methods import METHODS
from ptmoe.models.bases import load_base
from ptmoe.report.page import write_run_report
from ptmoe.runs.records import Environment, LogLine
from ptmoe.train import TrainOptions, train
from ptmoe.train.checkpoints import MANIFEST, seal
from ptmoe.train.resume import FREE, _differing, continued, recorded
from testing.bases import tiny_llama
from testing.losses import ROWS, labelled

METHOD = {"name": "pt-moe", "num_virtual_tokens": 4, "num_experts": 2, "rank": 2}


def data(path, answer=3):
    lines = [{"prompt": f"Add {n} and {n + 3} =>", "completion": f" {2 * n + answer}"} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("resume")
    chosen = {"method": METHOD, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    train(TrainOptions(data=data(folder / "data.jsonl"), output_dir=str(folder / "run"), **chosen), say=lambda _: None)
    return folder


@pytest.fixture
def run_folder(stopped, tmp_path):
    """A copy of that run, stopped after step 2."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    return tmp_path / "run"


def state(folder):
    """Every file of a folder, as it is, but the lock, which some versions of `filelock` write anew."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


OTHER = {
    "method": ({"method": {"name": "pt"}}, "method was 'pt-moe', is 'pt'"),
    "rank": ({"method": {**METHOD, "rank": 3}}, "rank was 2, is 3"),
    "a field of the method": ({"method": {"name": "pt-moe", "router_noise": 0.5}}, "router_noise was 0.1, is 0.5"),
    "model": ({"model": "./other"}, "model was 'nano', is './other'"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "steps": ({"max_steps": 8}, "max_steps was 4, is 8"),
    "batch size": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 4, is 2"),
    "learning rate": ({"learning_rate": 1.5}, "learning_rate was .*, is 1.5"),
    "chat": ({"chat": True}, "chat was False, is True"),
    "arguments of transformers": ({"trainer": {"adam_beta1": 0.5}}, r"trainer was \{\}, is \{'adam_beta1': 0.5\}"),
    "the data as well": ({"seed": 1, "data": "other.jsonl"}, "seed was 0, is 1, data was '.*', is 'other.jsonl'"),
    "two at once": ({"seed": 1, "weight_decay": 0.5}, "seed was 0, is 1, weight_decay was 0.0, is 0.5"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_differs_from_the_record_is_named_and_nothing_is_written(name, stopped, run_folder):
    changes, message = OTHER[name]
    before = state(run_folder)
    options = TrainOptions(**{"data": str(stopped / "data.jsonl"), "output_dir": str(run_folder), **changes})
    with pytest.raises(ptmoe.PtmoeError, match=f"trained otherwise .*{message}"):
        train(options, resume=True)
    assert state(run_folder) == before


def other_values(record):
    """Another value of each option that decides something, and of each field of the method, by its name."""
    values = (77, 0.77, "other", True, "float32", "8bit", "cut", False, {"a": 1}, "momentum=0.9")
    for name in TrainOptions.model_fields.keys() - FREE - {"method", "task"}:
        needed = {"optim": "sgd"} if name.startswith("optim_") else {}
        for value in values:
            with suppress(ptmoe.PtmoeError):
                changes = {**needed, name: value}
                if getattr(TrainOptions(data=record.data, **changes), name) != getattr(record, name):
                    yield name, changes
                    break
    for name, value in record.method.items():
        if isinstance(value, (int, float)):
            other = value + 1 if isinstance(value, int) else value / 2 + 0.01
            yield name, {"method": {name: not value if isinstance(value, bool) else other}}


def test_every_option_that_may_not_change_is_refused(run_folder):
    """Whatever options are added: each either decides nothing about the training, or is compared."""
    record, checked = recorded(run_folder), set()
    for name, changes in other_values(record):
        if "method" not in changes:
            changed = TrainOptions(data=record.data, output_dir=str(run_folder), **changes)
            with pytest.raises(ptmoe.PtmoeError, match=f"{name} was "):
                continued(changed, run_folder)
            checked.add(name)
    assert checked == TrainOptions.model_fields.keys() - FREE - {"method", "task"}


def edited(run_folder, changes):
    """The run with other options in its `config.yaml`."""
    file = run_folder / "config.yaml"
    written = yaml.safe_load(file.read_text())
    method = {**written["method"], **changes.get("method", {})}
    file.write_text(yaml.safe_dump({**written, **changes, "method": method}))


@pytest.mark.ci
def test_every_option_that_was_edited_in_the_config_is_refused_and_named(stopped, run_folder):
    """Whether the same command is given again, or the folder alone, as `ptmoe train --resume --output-dir RUN` does."""
    original, record, checked = (run_folder / "config.yaml").read_text(), recorded(run_folder), set()
    for name, changes in other_values(record):
        edited(run_folder, changes)
        try:
            folder_alone = recorded(run_folder, output_dir=str(run_folder))
        except ptmoe.PtmoeError:  # no such value
            continue
        again = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder))
        for options in (again, folder_alone):
            with pytest.raises(
                ptmoe.PtmoeError, match=rf"{name} was .*config.yaml was changed since, put .*{name}.* back"
            ):
                continued(options, run_folder)
            with suppress(ptmoe.PtmoeError):
                taken, differing = continued(options, run_folder, force=True)
                assert name in differing
                assert getattr(taken, name, taken.method.get(name)) == differing[name][1]
        was = {"method": record.method} if "method" in changes else {name: getattr(record, name) for name in changes}
        _, differing = continued(TrainOptions(data=record.data, output_dir=str(run_folder), **was), run_folder)
        assert not differing, "what is given takes precedence over the file"
        checked.add(name)
        (run_folder / "config.yaml").write_text(original)
    assert checked >= TrainOptions.model_fields.keys() - FREE - {"method", "task"}
    assert checked >= {"router_noise", "num_virtual_tokens", "rank"}
    edited(run_folder, {"save_steps": 7, "logging_steps": 3, "eval_examples": 5})
    taken, differing = continued(recorded(run_folder), run_folder)
    assert (taken.save_steps, taken.logging_steps, taken.eval_examples, differing) == (7, 3, 5, {})


@pytest.mark.ci
def test_the_command_of_a_run_resumes_it_in_whatever_order_it_names_modules(stopped, tmp_path):
    method = {"name": "lora", "target_modules": ["v_proj", "k_proj", "v_proj"]}
    source, folder = str(stopped / "data.jsonl"), str(tmp_path / "run")
    options = TrainOptions(data=source, output_dir=folder, method=method, max_steps=1)
    for resume in (False, True):
        assert train(options, resume=resume, say=lambda _: None).result.steps == 1
    assert recorded(tmp_path / "run").method["target_modules"] == ["k_proj", "v_proj"]


@pytest.mark.ci
def test_an_edited_config_is_left_as_it_is_or_by_force_trained_with_and_recorded(stopped, run_folder):
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder))
    edited(run_folder, {"learning_rate": 0.5, "seed": 3, "method": {"router_noise": 0.7}})
    before, old = state(run_folder), recorded(stopped / "run").learning_rate
    with pytest.raises(
        ptmoe.PtmoeError, match=rf"seed was 0, is 3, learning_rate was {old}, is 0.5, router_noise was 0.1"
    ):
        train(options, resume=True)
    assert state(run_folder) == before
    train(options, resume=True, force=True, say=lambda _: None)
    (change,) = Environment.read(run_folder / "environment.json").changes
    assert change.differences == {"seed": (0, 3), "learning_rate": (old, 0.5), "router_noise": (0.1, 0.7)}
    rates = [line.learning_rate for line in LogLine.read_lines(run_folder / "metrics.jsonl")]
    whole = [line.learning_rate for line in LogLine.read_lines(stopped / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([*whole[:2], *(rate * 0.5 / old for rate in whole[2:])])
    continued(options, run_folder)  # it is the record now


@pytest.mark.ci
def test_a_run_of_an_earlier_version_goes_on_by_its_config(stopped, run_folder):
    file = run_folder / "environment.json"
    written = json.loads(file.read_text())
    assert written.pop("options")["seed"] == 0
    file.write_text(json.dumps(written))
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder))
    assert train(options, resume=True, say=lambda _: None).result.steps == 4
    assert json.loads(file.read_text())["options"]["seed"] == 0
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "data": None}))
    messages = []
    train(options, resume=True, say=messages.append)
    assert any("records no fingerprint of the data" in message for message in messages)


@pytest.mark.parametrize("kept", ["checkpoints", "adapter", "result.json"])
def test_what_a_run_has_made_is_not_overwritten_where_its_config_is_missing(kept, stopped, tmp_path):
    folder = tmp_path / "run"
    (shutil.copytree if (stopped / "run" / kept).is_dir() else copied_file)(stopped / "run" / kept, folder / kept)
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(folder), method=METHOD, max_steps=2)
    before = state(folder)
    with pytest.raises(ptmoe.PtmoeError, match=rf"holds {kept}, and config.yaml, .* is missing: put it back"):
        train(options, resume=True, say=lambda _: None)
    assert state(folder) == before


def copied_file(source, target):
    target.parent.mkdir()
    shutil.copy(source, target)


@pytest.mark.ci
def test_where_the_record_of_the_data_is_missing_that_is_said_and_nothing_is_written(stopped, run_folder, tmp_path):
    (run_folder / "environment.json").unlink()
    before = state(run_folder)
    for source in (str(stopped / "data.jsonl"), data(tmp_path / "other.jsonl", answer=4)):
        options = TrainOptions(data=source, output_dir=str(run_folder))
        with pytest.raises(ptmoe.PtmoeError, match=r"environment\.json is missing, which says what data .*--force"):
            train(options, resume=True, say=lambda _: None)
        assert state(run_folder) == before
    train(options, resume=True, force=True, say=lambda _: None)
    made = Environment.read(run_folder / "environment.json")
    assert made.changes[0].differences == {"fingerprint of the data": (None, made.data)}


@pytest.mark.ci
def test_other_data_are_refused_by_their_fingerprint_and_moved_data_are_not(stopped, run_folder, tmp_path):
    before = state(run_folder)
    other = data(tmp_path / "other.jsonl", answer=4)
    with pytest.raises(
        ptmoe.PtmoeError, match=r"other\.jsonl does not hold the data .*it names .*data\.jsonl; the finger"
    ):
        train(TrainOptions(data=other, output_dir=str(run_folder)), resume=True)
    assert state(run_folder) == before
    moved = shutil.copy(stopped / "data.jsonl", tmp_path / "moved.jsonl")
    resumed = train(TrainOptions(data=str(moved), output_dir=str(run_folder)), resume=True, say=lambda _: None)
    assert resumed.result.steps == 4
    assert recorded(run_folder).data == str(moved)
    environments = [Environment.read(folder / "environment.json") for folder in (stopped / "run", run_folder)]
    assert environments[0].data == environments[1].data is not None


@pytest.mark.parametrize("less", [{"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_a_run_does_not_end_before_its_checkpoint_even_by_force(less, stopped, run_folder):
    before, (name, value) = state(run_folder), [*less.items()][-1]
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder), **less)
    with pytest.raises(ptmoe.PtmoeError, match=rf"{name}={value:g}: .*checkpoint-2 has \d"):
        train(options, resume=True, force=True, say=lambda _: None)
    assert state(run_folder) == before


@pytest.mark.parametrize("file", ["optimizer.safetensors", "trainer_state.json", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(file, stopped, run_folder):
    (run_folder / "checkpoints" / "checkpoint-2" / file).unlink()
    before = state(run_folder)
    with pytest.raises(ptmoe.PtmoeError, match="checkpoint-2"):
        train(TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder)), resume=True)
    assert state(run_folder) == before


def test_a_base_of_the_same_name_with_other_weights_is_refused(tmp_path):
    base, tokenizer = load_base("nano")
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    chosen = {"method": METHOD, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    options = TrainOptions(
        model=str(tmp_path / "base"), data=data(tmp_path / "d.jsonl"), output_dir=str(tmp_path / "run"), **chosen
    )
    train(options, say=lambda _: None)
    base.get_input_embeddings().weight.data.mul_(1.5)
    base.save_pretrained(tmp_path / "base")
    before = state(tmp_path / "run")
    with pytest.raises(ptmoe.PtmoeError, match="was trained on another base"):
        train(options, resume=True)
    assert state(tmp_path / "run") == before


@pytest.mark.ci
def test_other_versions_and_hardware_are_said_and_recorded_and_refuse_nothing(stopped, run_folder):
    """Whatever the environment records of them; a run that goes on where it began records nothing."""
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder))
    file, said = run_folder / "environment.json", []
    here = Environment.read(file)
    hardware = here.hardware | {"processor": "a Z80", "accelerator": "an abacus"}
    before = here.model_copy(
        update={"commit": "0", "hardware": hardware, "versions": dict.fromkeys(here.versions, "0")}
    )
    before.write(file)
    train(options, resume=True, say=said.append)
    (change,) = Environment.read(file).changes
    now = {f"version of {name}": version for name, version in here.versions.items()} | {"commit": here.commit}
    now |= {name: here.hardware[name] for name in ("processor", "accelerator")}
    assert (change.step, {name: value for name, (_, value) in change.differences.items()}) == (2, now)
    (line,) = [line for line in said if line.startswith("resumed elsewhere")]
    page = html.unescape(write_run_report(run_folder).read_text())
    for name, (was, value) in change.differences.items():
        assert f"{name} was {was}, is {value}" in line
        assert f"since step 2: {name} was {was}, is {value}" in page
    shutil.rmtree(run_folder / "checkpoints" / "checkpoint-4")
    train(options, resume=True, say=said.append)
    assert Environment.read(file).changes == [change]
    assert len([line for line in said if line.startswith("resumed elsewhere")]) == 1


@pytest.mark.slow
def test_the_folder_alone_is_enough_and_the_run_ends_as_if_it_had_not_stopped(run, stopped, run_folder, tmp_path):
    status, out, err = run("train", "--resume", "--output-dir", run_folder)
    assert (status, err) == (0, "")
    assert "4 steps on 8 examples" in out
    whole, again = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (stopped / "run", run_folder)
    )
    assert all((again[name] == value).all() for name, value in whole.items())
    assert (run_folder / "config.yaml").read_text() == (stopped / "run" / "config.yaml").read_text()
    status, _, err = run("train", "--resume", "--output-dir", run_folder, "--method", "pt", "--max-steps", 8)
    assert status == 2
    assert "max_steps was 4, is 8" in err
    assert "method was 'pt-moe', is 'pt'" in err
    status, _, err = run("train", "--resume", "--output-dir", tmp_path / "none")
    assert (status, "holds no run to resume" in err) == (2, True)
    status, _, err = run("train", "--resume")
    assert (status, "name it with --output-dir" in err) == (2, True)


NOT_FORCED = ("method", "rank", "model", "the data as well", "chat")  # what nano and this data cannot do
CHANGED = {name: change for name, change in OTHER.items() if name not in NOT_FORCED}


QUICK = ("a field of the method", "two at once")


@pytest.mark.ci
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHANGED]
)
def test_force_goes_on_with_what_differs_and_records_both(name, stopped, run_folder):
    """Every option that is refused without it; the report names each."""
    changes, message = CHANGED[name]
    options = TrainOptions(**{"data": str(stopped / "data.jsonl"), "output_dir": str(run_folder), **changes})
    trained = train(options, resume=True, force=True, say=lambda _: None)
    assert trained.result.steps == changes.get("max_steps", 4)
    (change,) = Environment.read(run_folder / "environment.json").changes
    assert change.step == 2
    told = ", ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in change.differences.items())
    assert re.search(message, told)
    kept, method = recorded(run_folder), changes.get("method", {})
    assert all(getattr(kept, key) == value for key, value in changes.items() if key != "method")
    assert all(kept.method[key] == value for key, value in method.items())
    page = html.unescape(write_run_report(run_folder).read_text())
    assert "Training was resumed with other settings, or elsewhere." in page
    assert all(
        f"since step 2: {key} was {before}, is {now}" in page for key, (before, now) in change.differences.items()
    )
    resumed = train(options, resume=True, say=lambda _: None)  # it is the record now
    assert resumed.result.steps == trained.result.steps


@pytest.mark.ci
def test_a_forced_learning_rate_is_the_one_of_the_steps_that_follow(stopped, run_folder):
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder), learning_rate=1.5)
    train(options, resume=True, force=True, say=lambda _: None)
    before, after = (LogLine.read_lines(folder / "metrics.jsonl") for folder in (stopped / "run", run_folder))
    old, rates = recorded(stopped / "run").learning_rate, [line.learning_rate for line in after]
    assert [line.learning_rate for line in before][:2] == rates[:2]
    expected = [line.learning_rate * 1.5 / old for line in before]
    assert rates[2:] == pytest.approx(expected[2:])


class Killed(TrainerCallback):
    def on_step_begin(self, *arguments, **options):
        raise KeyboardInterrupt


@pytest.mark.ci
@pytest.mark.parametrize("changes", [{"learning_rate": 1.5}, {"max_steps": 6}], ids=str)
def test_what_was_forced_holds_where_the_run_is_killed_before_it_has_saved(changes, stopped, run_folder, tmp_path):
    if "max_steps" in changes:  # from a checkpoint that was the last
        run_folder = shutil.copytree(stopped / "run", tmp_path / "ended")
    runs = [run_folder, shutil.copytree(run_folder, tmp_path / "killed")]
    options = [TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run), **changes) for run in runs]
    train(options[0], resume=True, force=True, say=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        train(options[1], resume=True, force=True, callbacks=[Killed()], say=lambda _: None)
    train(options[1], resume=True, say=lambda _: None)
    first, second = (LogLine.read_lines(run / "metrics.jsonl") for run in runs)
    assert [line.learning_rate for line in second] == [line.learning_rate for line in first]
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert all((second[name] == value).all() for name, value in first.items())


@pytest.mark.ci
def test_other_data_and_another_base_go_on_by_force(tmp_path):
    base, tokenizer = load_base("nano")
    for part in (base, tokenizer):
        part.save_pretrained(tmp_path / "base")
    chosen = {"method": METHOD, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4}
    chosen |= {"model": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "save_total_limit": 5}
    options = TrainOptions(data=data(tmp_path / "d.jsonl"), **chosen)
    train(options, say=lambda _: None)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    base.get_input_embeddings().weight.data.mul_(1.5)
    base.save_pretrained(tmp_path / "base")
    data(tmp_path / "d.jsonl", answer=4)
    train(options, resume=True, force=True, say=lambda _: None)
    (change,) = Environment.read(tmp_path / "run" / "environment.json").changes
    assert set(change.differences) == {"fingerprint of the base", "fingerprint of the data"}
    assert all(before != now for before, now in change.differences.values())


@pytest.mark.ci
def test_a_checkpoint_of_other_processes_goes_on_by_force_alone(stopped, run_folder):
    """Each step of two processes reads two batches."""
    checkpoint = run_folder / "checkpoints" / "checkpoint-2"
    shutil.copy(checkpoint / "random_state.json", checkpoint / "random_state.1.json")
    (checkpoint / "random_state.json").rename(checkpoint / "random_state.0.json")
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    before = state(run_folder)
    options = TrainOptions(data=str(stopped / "data.jsonl"), output_dir=str(run_folder))
    with pytest.raises(ptmoe.PtmoeError, match=r"checkpoint-2 was made by 2 processes, and 1 would go on"):
        train(options, resume=True, say=lambda _: None)
    assert state(run_folder) == before
    train(options, resume=True, force=True, say=lambda _: None)
    (change,) = Environment.read(run_folder / "environment.json").changes
    assert change.differences == {"processes": (2, 1)}


def test_the_method_cannot_be_forced_and_force_alone_is_refused(stopped, run_folder):
    before = state(run_folder)
    options = {"data": str(stopped / "data.jsonl"), "output_dir": str(run_folder)}
    for changes, message in ((OTHER["method"][0], "method was 'pt-moe', is 'pt'"), (OTHER["rank"][0], "has shape")):
        with pytest.raises(ptmoe.PtmoeError, match=message):
            train(TrainOptions(**options, **changes), resume=True, force=True, say=lambda _: None)
    with pytest.raises(ptmoe.PtmoeError, match="--force is for a run that is resumed"):
        train(TrainOptions(**options | {"output_dir": f"{run_folder}-new"}), force=True)
    assert state(run_folder) == before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.ci
def test_a_plan_that_leaves_a_choice_to_the_run_is_the_one_it_was_made_with(name):
    """What attaching resolves of a method's config, such as its modules, is no difference."""
    planned = METHODS[name]()
    batches = [labelled(ROWS, [0] * 5)]  # which some start from
    base = tiny_llama(hidden_size=128, intermediate_size=128)
    made = ptmoe.attach(base, planned, batches=batches).method_config
    asked, record = ({"name": name, **config.model_dump()} for config in (planned, made))
    assert _differing({"method": asked}, TrainOptions(task="gsm8k", method=record)) == ({}, {})
