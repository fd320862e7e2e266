"""Two processes train as one does that accumulates their batches.

Run by `torch.distributed.run`, this file is one of the two.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ptmoe import PtmoeError
from ptmoe.fast.loss import IGNORED
from ptmoe.methods import PTMoEConfig
from ptmoe.train import TrainOptions
from ptmoe.train.batches import TokenBatches
from ptmoe.train.data import collate
from ptmoe.train.processes import differences
from ptmoe.train.recipe import run_folder
from ptmoe.train.trainer import PromptTrainer
from testing.bases import CONFIGS, prompted, tiny_llama, tokens

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "OMP_NUM_THREADS": "1",
}
LENGTHS = [5, 9, 14, 7, 20, 11, 6, 18]
METHODS = {
    "PT": CONFIGS["PT"],
    "PT-MoE": PTMoEConfig(num_virtual_tokens=5, num_experts=3, rank=2, router_noise=0.0),
}


def train(folder: Path, method: str, *, by_tokens: bool, stop: int | None = None, **options: object) -> list[list[int]]:
    """Two epochs, or `stop` steps of them; gives the lengths of the rows in each batch that this process computed."""
    rows = []
    for seed, length in enumerate(LENGTHS):
        ids = tokens(length, seed).cpu().numpy().astype(np.int32)
        labels = ids.copy()
        labels[: length - 1 - seed % 3] = IGNORED  # answers of one to three tokens
        rows.append({"input_ids": ids, "labels": labels})
    seen: list[list[int]] = []

    def watched(batch: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        seen.append([len(row["input_ids"]) for row in batch])
        return collate(batch)

    trainer = PromptTrainer(
        model=prompted(tiny_llama(), METHODS[method]),
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            save_strategy="no" if stop is None else "steps",
            save_steps=stop or 1,
            learning_rate=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            accelerator_config={"even_batches": False} if by_tokens else None,
            **options,  # type: ignore[arg-type]
        ),
        train_dataset=rows,
        data_collator=watched,
        batches=TokenBatches(LENGTHS, 30, seed=3, processes=2) if by_tokens else None,
    )
    if stop is not None:
        trainer.add_callback(_Stop(stop))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    if trainer.args.process_index == 0:
        save_file(
            {name: value.contiguous() for name, value in trainer.model.encoder.state_dict().items()}, folder / "trained"
        )
    return seen


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_training_stop = state.global_step >= self.step


def launched(*arguments: str) -> str:
    """What two processes of a program print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def two_processes(folder: Path, method: str, **options: object) -> list[list[list[int]]]:
    """`train` in two processes; gives what each saw."""
    folder.mkdir(exist_ok=True)
    launched(__file__, json.dumps([str(folder), method, options]))
    return [json.loads((folder / f"seen-{rank}").read_text()) for rank in range(2)]


def check_equal(first: Path, other: Path) -> None:
    expected = load_file(first / "trained")
    for name in expected.keys() - {"confidence"}:  # smoothed over batches, of which two processes see half each
        value = load_file(other / "trained")[name]
        assert torch.allclose(value, expected[name], atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("method", "by_tokens"), [("PT", False), ("PT-MoE", True)])
def test_two_processes_train_as_one(tmp_path: Path, method: str, by_tokens: bool) -> None:
    (tmp_path / "one").mkdir()
    size = {} if by_tokens else {"per_device_train_batch_size": 2}
    alone = train(tmp_path / "one", method, by_tokens=by_tokens, gradient_accumulation_steps=2, **size)
    first, second = two_processes(tmp_path / "two", method, by_tokens=by_tokens, **size)
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == alone
    check_equal(tmp_path / "one", tmp_path / "two")
    half = len(alone) // 2
    assert by_tokens == (alone[:half] != alone[half:])  # the second epoch has another order


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    two_processes(tmp_path / "whole", "PT-MoE", by_tokens=True)
    steps = len(TokenBatches(LENGTHS, 30, seed=3, processes=2)) // 2
    assert steps > 1
    two_processes(tmp_path / "parts", "PT-MoE", by_tokens=True, stop=steps + 1)  # the second epoch's first batch
    two_processes(tmp_path / "parts", "PT-MoE", by_tokens=True)
    check_equal(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_command_in_two_processes_writes_one_run_and_speaks_once(tmp_path: Path) -> None:
    chosen = ["--task", "nano/mixed", "--max-examples", "40", "--max-steps", "2", "--eval-examples", "8"]
    printed = launched("-m", "ptmoe", "train", *chosen, "--output-dir", str(tmp_path / "run"))
    assert printed.count("run folder") == 1
    assert len((tmp_path / "run" / "predictions" / "nano__mixed.jsonl").read_text().splitlines()) == 8
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_several_processes_need_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PtmoeError, match="2 processes write one run: name its folder with --output-dir"):
        run_folder(TrainOptions(task="nano/mixed"), resume=False)


# -- processes that stop, end or differ --------------------------------------------------------------------------------

BEGIN = """
import os, signal, sys, time
from ptmoe.train.options import TrainOptions
from ptmoe.train.processes import Processes
with Processes(TrainOptions(task="nano/mixed", trainer={"ddp_timeout": 3})) as processes:
    print("begun", os.environ["RANK"], os.getpid(), flush=True)
    time.sleep(60)  # as in an operation that waits for the other
"""
CHANGED = """
import os
from ptmoe.runs import environment
from ptmoe.train import processes
if os.environ["RANK"] == "1":
    processes.versions = lambda: environment.versions() | {"torch": "1.0"}
from ptmoe.cli import main
main()
"""
LONG = ["--task", "nano/mixed", "--method", "pt", "--max-steps", "100000", "--eval-examples", "4", "--batch-size", "2"]


class Launched:
    """Two processes of a command, and what they print."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        self.out = (folder / "printed").open("w+")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
        self.process = subprocess.Popen(
            [*launcher, *command], env=ENVIRONMENT, stdout=self.out, stderr=subprocess.STDOUT, text=True
        )

    @property
    def printed(self) -> str:
        return (self.folder / "printed").read_text()

    def pids(self) -> list[int]:
        """By rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                ancestor = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
                variables = dict(
                    entry.split("=", 1)
                    for entry in path.read_bytes().decode(errors="replace").split("\0")
                    if "=" in entry
                )
            except (OSError, ValueError):
                continue
            if ancestor == self.process.pid and "RANK" in variables:
                found[int(variables["RANK"])] = int(path.parent.name)
        return [found[number] for number in sorted(found)]

    def wait_for(self, condition: Callable[[], object]) -> None:
        while self.process.poll() is None and not condition():
            time.sleep(0.1)
        assert self.process.poll() is None, self.printed[-3000:]

    def seconds_until_ended(self, pid: int, most: float) -> float:
        started = time.monotonic()
        while time.monotonic() - started < most and state(pid) not in ("", "Z"):
            time.sleep(0.05)
        assert state(pid) in ("", "Z"), self.printed[-3000:]
        return time.monotonic() - started

    def end(self) -> str:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=60)
        return self.printed


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_ends_the_other_in_words(tmp_path: Path, frozen: int) -> None:
    both = Launched(tmp_path, sys.executable, "-c", BEGIN)
    both.wait_for(lambda: both.printed.count("begun") == 2)
    pids = both.pids()
    time.sleep(1)
    os.kill(pids[frozen], signal.SIGSTOP)
    both.seconds_until_ended(pids[1 - frozen], 20)
    printed = both.end()
    assert f"error: process {frozen} of 2 has given no sign for 3 s (`ddp_timeout`): it is frozen" in printed
    assert "ptmoe/train" not in printed  # no traceback but the launcher's


@needs_proc
@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_moment_or_with_all_others_is_not_given_up(tmp_path: Path) -> None:
    both = Launched(tmp_path, sys.executable, "-c", BEGIN)
    both.wait_for(lambda: both.printed.count("begun") == 2)
    pids = both.pids()
    for stopped, seconds in ((pids[:1], 1.5), (pids, 8)):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                os.kill(pid, number)
            time.sleep(seconds)
        assert all(state(pid) not in ("", "Z") for pid in pids), both.printed
    both.end()


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("stopped", [0, 1])
def test_training_ends_within_a_minute_where_a_process_is_frozen_or_dies(
    tmp_path: Path, number: signal.Signals, stopped: int
) -> None:
    command = [sys.executable, "-m", "ptmoe", "train", *LONG, "--output-dir", str(tmp_path / "run")]
    both = Launched(tmp_path, *command)
    both.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    pids = both.pids()
    time.sleep(2)
    os.kill(pids[stopped], number)
    assert both.seconds_until_ended(pids[1 - stopped], 80) < 70
    printed = both.end()
    said = (
        f"process {stopped} of 2 has given no sign for 60 s"
        if number == signal.SIGSTOP
        else "another of the 2 processes"
    )
    assert f"error: {said}" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exec $PYTHON -m ptmoe train --seed $RANK $ARGUMENTS", "option seed is 1, not 0"),
        ('exec $PYTHON -c "$CHANGED" train $ARGUMENTS', "version torch is '1.0', not"),
        ("exec $PYTHON -m ptmoe train --data-dir data-$RANK $ARGUMENTS", "data is '"),
    ],
    ids=["options", "versions", "data"],
)
def test_processes_that_differ_stop_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str
) -> None:
    task = "gsm8k" if "data-dir" in program else "nano/mixed"
    for number in range(2):
        (tmp_path / f"data-{number}").mkdir()
        line = {"question": f"What is {number} + 1?", "answer": f"It is. #### {number + 1}"}
        (tmp_path / f"data-{number}" / "train.jsonl").write_text(f"{json.dumps(line)}\n" * 40)
    chosen = f"--task {task} --max-examples 40 --max-steps 2 --method pt --output-dir {tmp_path / 'run'}"
    for name, value in (("PYTHON", sys.executable), ("CHANGED", CHANGED), ("ARGUMENTS", chosen)):
        monkeypatch.setitem(ENVIRONMENT, name, value)
    both = Launched(tmp_path, "bash", "-c", f"cd {tmp_path} && {program}")
    assert both.process.wait(timeout=200) != 0
    assert "error: process 1 of 2 differs from process 0" in both.printed
    assert said in both.printed
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_differences_are_named() -> None:
    first = {"option": {"seed": 0, "method": {"rank": 2}}, "data": "a"}
    assert differences(first, first) == []
    other = {"option": {"seed": 0, "method": {"rank": 3}}, "data": "a", "more": 1}
    assert differences(first, other) == ["option method rank is 3, not 2", "more is 1, not None"]


if __name__ == "__main__":
    place, name, given = json.loads(sys.argv[1])
    batches = train(Path(place), name, **given)
    Path(place, f"seen-{os.environ['RANK']}").write_text(json.dumps(batches))
    torch.distributed.barrier()  # a process that leaves first can abort the other
    torch.distributed.destroy_process_group()
