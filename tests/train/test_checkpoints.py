"""Runs that are killed, disks that fill, files that change: a checkpoint is whole, or another one is used and named."""

import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import ptmoe
from ptmoe.train import PromptTrainer, TrainOptions, train
from ptmoe.train import checkpoints as ours
from ptmoe.train.interruption import InterruptedRunError
from ptmoe.train.trainer import DivergedError
from testing.training import trainer

STEPS, EVERY = 7, 2


def options(folder, **changes):
    values = {
        "model": "nano",
        "task": "nano/mixed",
        "max_examples": 60,
        "eval_examples": 4,
        "max_steps": STEPS,
        "save_steps": EVERY,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "method": {"name": "pt-moe", "num_virtual_tokens": 4, "rank": 2, "num_experts": 2},
        "output_dir": str(folder),
    }
    return TrainOptions(**values | changes)


def quietly(folder, **changes):
    messages = []
    train(options(folder, **changes), resume=True, say=messages.append)
    return messages


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(options(folder), say=lambda text: None)
    return folder


def same_adapter(folder, other):
    first, second = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def copied(run, target):
    """A run that was cut off after its last checkpoint."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "adapter")
    (target / "result.json").unlink()
    return target


# -- damage ------------------------------------------------------------------------------------------------------------


def damages(path):
    data = path.read_bytes()
    yield "missing", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    yield "cut short", lambda: path.write_bytes(data[: len(data) // 2])
    yield "a bit flipped", lambda: path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])


@pytest.mark.ci
def test_every_damage_to_every_file_of_a_checkpoint_is_found(undisturbed, tmp_path):
    original = undisturbed / "checkpoints" / "checkpoint-7"
    assert ours.fault(original) is None
    names = sorted(path.name for path in original.iterdir())
    assert {"adapter_model.safetensors", "optimizer.safetensors", "random_state.json", "scheduler.json"} <= set(names)
    for name in names:
        for index, (damage, _) in enumerate(damages(original / name)):
            copy = tmp_path / f"{name}-{index}"
            shutil.copytree(original, copy)
            dict(damages(copy / name))[damage]()
            assert ours.fault(copy) is not None, (name, damage)


@pytest.mark.ci
@pytest.mark.parametrize("spoil", [os.remove, lambda path: os.truncate(path, os.path.getsize(path) // 2)])
def test_a_damaged_checkpoint_that_a_trainer_is_told_to_resume_from_is_refused_in_words(tmp_path, spoil):
    trainer(tmp_path, ptmoe.PTConfig(num_virtual_tokens=4), trainer_class=PromptTrainer).train()
    whole = tmp_path / "checkpoint-4"
    for name in sorted(path.name for path in whole.iterdir()):
        folder = shutil.copytree(whole, tmp_path / name / "checkpoint-4")
        spoil(folder / name)
        resumed = trainer(folder.parent, ptmoe.PTConfig(num_virtual_tokens=4), trainer_class=PromptTrainer, max_steps=6)
        with pytest.raises(ptmoe.PtmoeError, match=re.escape(name)):
            resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 0


def test_the_newest_whole_checkpoint_is_used_and_the_others_are_named(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path / "run")
    (run / "checkpoints" / "checkpoint-7" / "optimizer.safetensors").unlink()
    messages = quietly(run)
    assert any("checkpoint-7 is passed over: it lacks optimizer.safetensors" in message for message in messages)
    assert same_adapter(run, undisturbed)


def test_a_run_whose_training_had_ended_is_evaluated_and_takes_no_step_more(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text()
    quietly(run)
    assert same_adapter(run, undisturbed)
    assert (run / "metrics.jsonl").read_text() == lines
    assert json.loads((run / "result.json").read_text())["steps"] == STEPS


def test_where_no_checkpoint_can_be_used_that_is_said_and_nothing_is_changed(undisturbed, tmp_path):
    run = copied(undisturbed, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "scheduler.json").write_text("{}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ptmoe.PtmoeError, match=r"no checkpoint in .* can be used .*scheduler.json was changed"):
        quietly(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.slow
def test_a_disk_that_fills_in_a_save_leaves_the_earlier_checkpoints_and_the_run_goes_on_later(
    undisturbed, tmp_path, monkeypatch, step
):
    def full(folder, real=ours.seal):
        if folder.name == f"checkpoint-{step}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder)

    run = tmp_path / "run"
    monkeypatch.setattr("ptmoe.train.trainer.seal", full)
    with pytest.raises(OSError, match="No space left"):
        train(options(run), say=lambda text: None)
    found = {path.name for path in (run / "checkpoints").glob("checkpoint-*")}
    assert found == {f"checkpoint-{earlier}" for earlier in range(EVERY, step, EVERY)}
    assert all(ours.fault(path) is None for path in (run / "checkpoints").glob("checkpoint-*"))
    monkeypatch.undo()
    quietly(run)
    assert same_adapter(run, undisturbed)


# -- kills -------------------------------------------------------------------------------------------------------------

forks = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="a forked process cannot use the accelerator that its parent has used"
)


def in_child(work):
    """The exit status of a forked process; of a killed one, minus the signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(run, event):
    """Train until the n-th time that a file in the run's folder is opened to write, renamed or removed: SIGKILL."""

    def work():
        seen = 0

        def watch(name, arguments):
            nonlocal seen
            writes = name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree") or (
                name == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
            )
            if writes and str(run) in str(arguments[0]):
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        quietly(run)

    return ended(in_child(work))


def survives(run, undisturbed):
    """The same command again ends the run, and its adapter is that of the undisturbed one."""
    assert ended(in_child(lambda: quietly(run))) == 0
    assert same_adapter(run, undisturbed)
    assert all(ours.fault(path) is None for path in (run / "checkpoints").glob("checkpoint-*"))


QUICK = (1, 9, 27, 54)  # writes
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in range(3, 70, 2) if n not in QUICK]


@pytest.mark.ci
@forks
@pytest.mark.parametrize("event", [*QUICK, *SLOW])
def test_a_run_killed_at_any_write_ends_the_same_by_the_same_command(undisturbed, tmp_path, event):
    run = tmp_path / "run"
    if killed_at(run, event) == 0:
        pytest.skip(f"the run writes fewer than {event} times")
    survives(run, undisturbed)


@forks
@pytest.mark.slow
@pytest.mark.parametrize("moment", [number / 30 for number in range(30)])
def test_a_run_killed_at_any_moment_ends_the_same_by_the_same_command(undisturbed, tmp_path, moment):
    run = tmp_path / "run"
    seconds = float(os.environ.get("PTMOE_TEST_RUN_SECONDS", "4"))
    pid = in_child(lambda: quietly(run))
    time.sleep(moment * seconds)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    survives(run, undisturbed)


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(undisturbed, tmp_path, number):
    run, before = tmp_path / "run", signal.getsignal(number)

    class Signals(ptmoe.RoutingCallback):  # any callback: at step 3 a signal comes
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRunError, match=rf"{signal.Signals(number).name}.*step 3.*--resume") as raised:
        train(options(run), callbacks=[Signals()], say=lambda text: None)
    assert raised.value.status == 128 + number
    assert (run / "checkpoints" / "checkpoint-3").exists()
    assert signal.getsignal(number) == before
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"seconds": 5_000}) + "\n" for line in lines))
    quietly(run)
    assert same_adapter(run, undisturbed)
    assert json.loads((run / "result.json").read_text())["train_seconds"] > 5_000, "all of it, not since it was resumed"


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_signal_after_the_last_step_loses_nothing_and_says_where_it_is(tmp_path, strategy):
    class Signal(TrainerCallback):
        def on_train_end(self, *arguments, **more):
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = options(tmp_path / "run", max_steps=1, method={"name": "pt"}, trainer={"save_strategy": strategy})
    with pytest.raises(InterruptedRunError, match="SIGTERM ended training at step 1, saved in") as error:
        train(chosen, callbacks=[Signal()], say=lambda text: None)
    place = Path(re.search("saved in (.*):", str(error.value))[1])
    assert (place / ("adapter_model.safetensors" if strategy == "no" else "checkpoint-1")).exists()


@pytest.mark.parametrize(("strategy", "step"), [("steps", EVERY * 2), ("steps", STEPS), ("no", STEPS)])
@pytest.mark.ci
def test_weights_that_the_last_update_breaks_are_never_saved(tmp_path, step, strategy):
    """No later loss shows it: the update is a checkpoint's, or the last of the run."""

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **_):
            if state.global_step + 1 == step:
                next(model.encoder.parameters()).data.view(-1)[0] = float("inf")

    run = tmp_path / "run"
    with pytest.raises(ptmoe.PtmoeError, match=rf"^the weights became .* at step {step}; stopped with the adapter"):
        train(options(run, trainer={"save_strategy": strategy}), callbacks=[Break()], say=lambda _: None)
    saved = list(run.rglob("adapter_model.safetensors"))
    assert run / "adapter" / "adapter_model.safetensors" in saved
    assert all(bool(value.isfinite().all()) for path in saved for value in load_file(path).values())
    assert not (run / "result.json").exists()


def test_a_checkpoint_that_takes_the_place_of_another_is_whole_at_any_moment(undisturbed, tmp_path, monkeypatch):
    """As where a signal and the end of an epoch save the same step."""
    run = copied(undisturbed, tmp_path / "run")
    target = run / "checkpoints" / f"checkpoint-{STEPS}"
    again = run / "checkpoints" / ours.PARTIAL / target.name
    shutil.copytree(target, again)

    def killed(path, **_):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ours.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ours.publish(again, target)
    assert ours.newest_whole(target.parent, pytest.fail) == target
    shutil.copytree(target, again)  # and what was left over does not keep a later one from its place
    ours.publish(again, target)
    assert sorted(path.name for path in target.parent.glob(f"{target.name}*")) == [target.name]


@pytest.mark.ci
def test_a_checkpoint_of_the_weights_alone_is_not_gone_on_from_as_if_it_were_whole(tmp_path):
    """Its learning rate would start anew."""
    run, weights = tmp_path / "run", {"trainer": {"save_only_model": True}}
    train(options(run, **weights), say=lambda _: None)
    shutil.rmtree(run / "checkpoints" / f"checkpoint-{STEPS}")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ptmoe.PtmoeError, match=r"checkpoint-6 lacks scheduler\.json.*save_only_model"):
        quietly(run, **weights)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# -- which are kept ----------------------------------------------------------------------------------------------------


def best_trainer(folder, losses, **arguments):
    """A trainer whose evaluations give these losses."""
    from transformers import TrainingArguments

    from ptmoe.train.data import collate
    from ptmoe.train.trainer import PromptTrainer
    from testing.bases import tiny_llama, tokens

    ids = [tokens(6, seed) for seed in range(12)]
    rows = [{"input_ids": row, "labels": torch.cat([torch.full_like(row[:4], -100), row[4:]])} for row in ids]
    options = {"max_steps": 5, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 0.03}
    made = PromptTrainer(
        model=ptmoe.attach(tiny_llama(), ptmoe.PTMoEConfig(num_virtual_tokens=4, num_experts=2, rank=2)),
        args=TrainingArguments(
            str(folder), use_cpu=True, disable_tqdm=True, report_to="none", remove_unused_columns=False,
            **options | arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows[:2],
        data_collator=collate,
        callbacks=[ptmoe.RoutingCallback()],
    )  # fmt: skip
    given = iter(losses)
    made.evaluation_loop = lambda *_, **__: type(
        "Output", (), {"metrics": {"eval_loss": next(given)}, "num_samples": 2, "predictions": None, "label_ids": None}
    )()
    return made


@pytest.mark.parametrize(("losses", "best"), [([3, 1, 2, 4, 5], 2), ([5, 4, 3, 2, 1], 5), ([1, 2, 3, 4, 5], 1)])
@pytest.mark.ci
def test_the_best_checkpoint_is_kept_beside_the_last_and_loaded_at_the_end(tmp_path, losses, best):
    trainer = best_trainer(tmp_path, losses, load_best_model_at_end=True, save_total_limit=2)
    trainer.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-5", *({"checkpoint-4"} if best == 5 else ())}
    assert all(ours.fault(path) is None for path in tmp_path.glob("checkpoint-*"))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    written = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == trainer.state.best_model_checkpoint
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.encoder.tensors().items())


class Shifting(torch.optim.SGD):
    """Trains at other weights than those to be saved, as schedule-free optimizers do."""

    training = True

    @torch.no_grad()
    def _shift(self, training):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(int(training) - int(self.training))
        self.training = training

    def train(self):
        self._shift(True)

    def eval(self):
        self._shift(False)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == 3


def test_the_best_checkpoint_is_loaded_as_it_is_whatever_weights_the_optimizer_trains_at(tmp_path):
    trainer = best_trainer(tmp_path, [2], eval_steps=2, save_steps=2, load_best_model_at_end=True)
    trainer.optimizer = Shifting(trainer.model.encoder.parameters(), 0.01)
    trainer.add_callback(Stop())
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.encoder.tensors().items())


def test_a_second_training_that_diverges_at_once_leaves_what_the_first_has_made(tmp_path):
    again = trainer(tmp_path, ptmoe.PTMoEConfig(num_virtual_tokens=4, rank=3), trainer_class=PromptTrainer)
    again.train()
    made = {name: value.clone() for name, value in again.model.encoder.tensors().items()}
    again.compute_loss = lambda model, *_, **__: sum(map(torch.sum, model.encoder.parameters())) * torch.nan
    with pytest.raises(DivergedError, match="at step 1"):
        again.train()
    for name, value in again.model.encoder.tensors().items():
        torch.testing.assert_close(value, made[name], atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_trainer_still_knows_the_best_checkpoint(tmp_path):
    best_trainer(tmp_path, [3, 1, 2], load_best_model_at_end=True, save_total_limit=2, max_steps=3).train()
    resumed = best_trainer(tmp_path, [5, 6], load_best_model_at_end=True, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}


@pytest.mark.parametrize(
    "asked", [{"load_best_model_at_end": True}, {"metric_for_best_model": "loss"}, {"save_strategy": "best"}]
)
def test_a_run_refuses_to_keep_the_best_of_what_it_does_not_evaluate(tmp_path, asked):
    with pytest.raises(ptmoe.PtmoeError, match=r"needs an evaluation during training.*PromptTrainer"):
        train(options(tmp_path / "run", trainer=asked), say=lambda text: None)
    assert not (tmp_path / "run").exists()


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.ci
def test_no_clock_and_no_time_zone_decides_anything(undisturbed, tmp_path, monkeypatch):
    """A clock that runs backwards, files from the future, and another time zone for each half of a run."""
    run, now = copied(undisturbed, tmp_path / "run"), [4e9]
    shutil.rmtree(run / "checkpoints" / "checkpoint-7")
    for age, path in enumerate(sorted(run.rglob("*"), reverse=True)):
        os.utime(path, (now[0] - age, now[0] - 1000 * age))

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        messages = quietly(run)
        assert not any("passed over" in message for message in messages)
        assert same_adapter(run, undisturbed)
        assert json.loads((run / "result.json").read_text())["steps"] == STEPS
        assert json.loads((run / "result.json").read_text())["train_seconds"] >= 0
        kept = {path.name for path in (run / "checkpoints").glob("checkpoint-*")}
        assert kept == {"checkpoint-6", "checkpoint-7"}
    monkeypatch.undo()
    time.tzset()
