"""Runs that are killed, disks that fill, files that change: a checkpoint is whole, or another one is used and named."""

import errno
import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import ptmoe
from ptmoe.train import TrainOptions, train
from ptmoe.train import checkpoints as ours
from ptmoe.train.interruption import InterruptedRunError

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(undisturbed, tmp_path, number):
    run = tmp_path / "run"

    class Signals(ptmoe.RoutingCallback):  # any callback: at step 3 a signal comes
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRunError, match=rf"{signal.Signals(number).name}.*step 3.*--resume") as raised:
        train(options(run), callbacks=[Signals()], say=lambda text: None)
    assert raised.value.status == 128 + number
    assert (run / "checkpoints" / "checkpoint-3").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    quietly(run)
    assert same_adapter(run, undisturbed)
