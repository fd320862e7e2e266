"""Several processes train as one does that accumulates their batches, and evaluate as one, the base sharded or not.

Run by a launcher, this file is one of them.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import Self

from ptmoe import PtmoeError, load_task, nano
from ptmoe.evaluate import evaluate
from ptmoe.fast.loss import IGNORED
from ptmoe.methods import PTMoEConfig, PTMoERoAdConfig
from ptmoe.models.bases import load_base
from ptmoe.train import TrainOptions
from ptmoe.train.batches import Blank, TokenBatches
from ptmoe.train.data import collate
from ptmoe.train.processes import differences
from ptmoe.train.recipe import run_folder
from ptmoe.train.trainer import PromptTrainer
from testing.architectures import ARCHITECTURES
from testing.bases import CONFIGS, batch, prompted, tiny, tiny_llama, tokens
from testing.processes import ENVIRONMENT, Launched, launched, needs_proc, state, torchrun

LENGTHS = [5, 9, 14, 7, 20, 11, 6, 18, 8]  # in twos, a batch of one is left
METHODS = {
    "PT": CONFIGS["PT"],
    "PT-MoE": PTMoEConfig(num_virtual_tokens=5, num_experts=3, rank=2, router_noise=0.0),
    "PT-MoE-RoAd": PTMoERoAdConfig(num_virtual_tokens=5, num_experts=3, rank=2, router_noise=0.0),
}


def train(
    folder: Path,
    method: str,
    *,
    by_tokens: bool,
    stop: int | None = None,
    sharding: str | None = None,
    **options: object,
) -> list[list[int]]:
    """Two epochs, or `stop` steps of them; gives the lengths of the rows in each batch that this process computed, but
    for blank ones."""
    rows = []
    for seed, length in enumerate(LENGTHS):
        ids = tokens(length, seed).cpu().numpy().astype(np.int32)
        labels = ids.copy()
        labels[: length - 1 - seed % 3] = IGNORED  # answers of one to three tokens
        rows.append({"input_ids": ids, "labels": labels})
    seen: list[list[int]] = []

    def watched(rows_of: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        if not isinstance(rows_of[0], Blank):
            seen.append([len(row["input_ids"]) for row in rows_of])
        return collate(rows_of)

    base = tiny_llama() if sharding is None else load_base(str(folder.parent / "base"), sharding=sharding)[0]
    trainer = PromptTrainer(
        model=prompted(base, METHODS[method]),
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            save_strategy="no" if stop is None else "steps",
            save_steps=stop or 1,
            logging_steps=1,
            learning_rate=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
            **options,  # type: ignore[arg-type]
        ),
        train_dataset=rows,
        data_collator=watched,
        batches=TokenBatches(LENGTHS, 30, seed=3) if by_tokens else None,
    )
    if stop is not None:
        trainer.add_callback(_Stop(stop))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    if trainer.args.process_index == 0:
        save_file(
            {name: value.contiguous() for name, value in trainer.model.encoder.state_dict().items()}, folder / "trained"
        )
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        (folder / "losses").write_text(json.dumps(losses))
    return seen


def evaluated(folder: Path) -> None:
    """Ten answers of nano behind a routed adapter, into `folder`."""
    base, tokenizer = load_base("nano")
    model = prompted(base, PTMoEConfig(num_virtual_tokens=5, num_experts=3, rank=2))
    examples = load_task("nano/mixed", "test", max_examples=10)
    together = "WORLD_SIZE" in os.environ
    evaluate(model, tokenizer, examples, batch_size=2, max_new_tokens=4, folder=folder, together=together)


class Memory(threading.Thread):
    """The most memory of its own, in bytes, that this process takes within the context beyond what it had before."""

    def __enter__(self) -> Self:
        self.before, self.most, self.ended = self.own(), 0, threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        while not self.ended.wait(0.0005):
            self.most = max(self.most, self.own() - self.before)

    @staticmethod
    def own() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def memory(folder: Path, sharding: str) -> None:
    """What loading a base and a training step on it hold of the base, by process."""
    load_base("nano", sharding=sharding)  # what the library itself takes
    own = Memory().__enter__()
    base, _ = load_base(str(folder.parent / "base"), sharding=sharding)
    rank, parts, most = os.environ["RANK"], 0, 0
    for parameter in base.parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
        parts += part.nbytes

    def see(*_: object) -> None:
        nonlocal most
        whole = [one for one in base.parameters() if not hasattr(one, "to_local")]
        most = max(most, parts + sum(one.nbytes for one in whole))

    for module in base.modules():
        if not list(module.children()):
            module.register_forward_hook(see)
            module.register_full_backward_pre_hook(see)
    model = prompted(base, CONFIGS["PT"]).train()
    ids = tokens(12)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    own.__exit__()
    size = 4 * sum(prod(getattr(one, "ds_shape", one.shape)) for one in base.parameters())
    held = {"base": size, "parts": parts, "most at once": most, "own": own.most}
    (folder / f"held-{rank}").write_text(json.dumps(held))


def gradients(folder: Path, sharding: str, architectures: list[str]) -> None:
    """Of adapters on bases of several architectures, whole and sharded: they must be equal."""
    for name in architectures:
        architecture, _, tied = name.partition(" ")
        whole = tiny(architecture, vocab_size=512, tie_word_embeddings=bool(tied))
        if os.environ["RANK"] == "0":
            save_base(folder / name, whole)
        torch.distributed.barrier()
        base, _ = load_base(str(folder / name), sharding=sharding)
        rows = [tokens(length, int(os.environ["RANK"])) for length in (9, 5)]
        ids, mask = batch(rows, [0, 2])
        labels = ids.masked_fill(mask.cumsum(1) < 4, IGNORED).masked_fill(mask == 0, IGNORED)
        for method in ("PT-MoE", "PT-MoE-RoAd"):
            made = []
            for one in (whole, base):
                model = prompted(one, METHODS[method])  # in evaluation mode: some drop out
                for _ in range(2):
                    loss = model(input_ids=ids, attention_mask=mask, labels=labels, skip_logits=True).loss
                    loss.backward()
                parts = [part for part in model.encoder.parameters() if part.grad is not None]
                made.append([loss.detach(), *(part.grad for part in parts)])
            for expected, given in zip(*made, strict=True):
                assert torch.allclose(given, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), name
        held = [one for _, one in layers(base) for one in one.parameters()]
        assert held
        assert all(hasattr(one, "to_local") or one.numel() == 0 or one.ds_persist for one in held), name


def layers(base: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    return [(name, one) for name, one in base.named_modules() if isinstance(one, GradientCheckpointingLayer)]


def save_base(folder: Path, base: PreTrainedModel) -> None:
    """As `load_base` takes it."""
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(nano.FOLDER)).save_pretrained(folder)


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_training_stop = state.global_step >= self.step


def in_processes(count: int, folder: Path, *calls: tuple[str, str, dict[str, object]]) -> list[list[list[list[int]]]]:
    """Runs `train` in the named folders within `folder`, or `evaluated`; what `train` saw, by process."""
    for name, _, _ in calls:
        (folder / name).mkdir(exist_ok=True)
    launched(*torchrun(count), __file__, json.dumps([str(folder), calls]))
    return [json.loads((folder / f"seen-{rank}").read_text()) for rank in range(count)]


def check_equal(first: Path, other: Path) -> None:
    expected = load_file(first / "trained")
    for name, value in load_file(other / "trained").items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    curves = [json.loads((folder / "losses").read_text()) for folder in (first, other)]
    assert curves[1] == pytest.approx(curves[0], abs=2e-4)  # `Trainer` rounds them


def check_same_answers(first: Path, other: Path) -> None:
    """To the byte, but for how long it took."""
    for name in ("predictions/nano__mixed.jsonl", "predictions/nano__mixed.settings.json"):
        assert (other / name).read_bytes() == (first / name).read_bytes()
    summaries = [json.loads((folder / "eval" / "nano__mixed.json").read_text()) for folder in (first, other)]
    assert [summary.pop("seconds") is not None for summary in summaries] == [True, True]
    assert summaries[0] == summaries[1]


@pytest.mark.ci
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    options: dict[str, object] = {"by_tokens": False, "per_device_train_batch_size": 2}
    for name in ("one", "one-road", "sharded", "answers"):
        (tmp_path / name).mkdir()
    save_base(tmp_path / "base", tiny_llama())
    train(tmp_path / "one-road", "PT-MoE-RoAd", gradient_accumulation_steps=2, **options)
    alone = train(tmp_path / "one", "PT-MoE", gradient_accumulation_steps=2, **options)
    evaluated(tmp_path / "answers")
    whole, kept = tmp_path / "answers", tmp_path / "resumed" / "predictions"
    kept.mkdir(parents=True)
    for path in (whole / "predictions").iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        (kept / path.name).write_bytes(b"".join(lines[:3] if path.suffix == ".jsonl" else lines))
    seen = in_processes(
        2,
        tmp_path,
        ("two", "PT-MoE", options),
        ("sharded", "PT-MoE", options | {"sharding": "fsdp"}),
        ("gradients", "gradients", {"sharding": "fsdp", "architectures": ["llama tied", "gpt2 tied"]}),
        ("shared", "evaluate", {}),
        ("resumed", "evaluate", {}),
        ("two-road", "PT-MoE-RoAd", options),
        ("sharded-road", "PT-MoE-RoAd", options | {"sharding": "fsdp"}),
    )
    for name in ("two-road", "sharded-road"):
        check_equal(tmp_path / "one-road", tmp_path / name)
    for index, name in enumerate(("two", "sharded")):
        check_equal(tmp_path / "one", tmp_path / name)
        assert sorted(seen[0][index] + seen[1][index]) == sorted(alone)
    check_same_answers(whole, tmp_path / "shared")
    check_same_answers(whole, tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_a_sharded_base_of_any_architecture_gives_the_same_gradients(tmp_path: Path, sharding: str) -> None:
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    every = [f"{name}{tied}" for name in ARCHITECTURES for tied in ("", " tied")]
    in_processes(2, tmp_path, ("all", "gradients", {"sharding": sharding, "architectures": every}))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "zero3"])
def test_no_process_ever_holds_a_whole_sharded_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: str
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system
    ahead = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 4_000_000}
    }
    (tmp_path / "zero3.json").write_text(json.dumps(ahead))  # by default 5 · 10⁷ parameters, more than this base has
    monkeypatch.setitem(ENVIRONMENT, "ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero3.json"))
    if sharding == "zero3":
        pytest.importorskip("deepspeed")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 512}
    save_base(tmp_path / "base", tiny_llama(**sizes))
    in_processes(2, tmp_path, ("memory", "memory", {"sharding": sharding}))
    for rank in range(2):
        held = json.loads((tmp_path / "memory" / f"held-{rank}").read_text())
        assert held["parts"] < 0.55 * held["base"]
        assert (
            held["parts"] < held["most at once"] < 0.75 * held["base"]
        )  # within a step: the parts, and what is gathered
        assert held["own"] < 0.9 * held["base"]  # memory of the process, files that are mapped left out


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("method", "by_tokens"), [("PT", False), ("PT-MoE", True)])
def test_processes_train_as_one_with_accumulation(tmp_path: Path, method: str, by_tokens: bool, count: int) -> None:
    (tmp_path / "one").mkdir()
    size: dict[str, object] = {} if by_tokens else {"per_device_train_batch_size": 1}
    options: dict[str, object] = {"by_tokens": by_tokens, **size}
    alone = train(tmp_path / "one", method, gradient_accumulation_steps=2 * count, **options)
    seen = in_processes(count, tmp_path, ("all", method, options | {"gradient_accumulation_steps": 2}))
    assert sorted(batch for (batches,) in seen for batch in batches) == sorted(alone)
    check_equal(tmp_path / "one", tmp_path / "all")
    half = len(alone) // 2
    assert by_tokens == (alone[:half] != alone[half:])  # the second epoch has another order


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    steps = -(-len(TokenBatches(LENGTHS, 30, seed=3)) // 2)
    assert steps > 1
    options: dict[str, object] = {"by_tokens": True}
    stopped = options | {"stop": steps + 1}  # the second epoch's first batch
    in_processes(2, tmp_path, ("whole", "PT-MoE", options), ("parts", "PT-MoE", stopped))
    in_processes(2, tmp_path, ("parts", "PT-MoE", options))
    check_equal(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_the_command_in_two_processes_writes_one_run_and_speaks_once(tmp_path: Path) -> None:
    chosen = ["--task", "nano/mixed", "--max-examples", "40", "--max-steps", "2", "--eval-examples", "8"]
    printed = launched(*torchrun(), "-m", "ptmoe", "train", *chosen, "--output-dir", str(tmp_path / "run"))
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
from ptmoe.train.processes import Processes
with Processes({"task": "nano/mixed"}, timeout=3) as processes:
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


@pytest.mark.ci
@needs_proc
@pytest.mark.parametrize("frozen", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_process_ends_the_other_in_words(tmp_path: Path, frozen: int) -> None:
    both = Launched(tmp_path, *torchrun(), "--no-python", sys.executable, "-c", BEGIN)
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
    both = Launched(tmp_path, *torchrun(), "--no-python", sys.executable, "-c", BEGIN)
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
    both = Launched(tmp_path, *torchrun(), "-m", "ptmoe", "train", *LONG, "--output-dir", str(tmp_path / "run"))
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
    both = Launched(tmp_path, *torchrun(), "--no-python", "bash", "-c", f"cd {tmp_path} && {program}")
    assert both.process.wait(timeout=200) != 0
    assert "error: process 1 of 2 differs from process 0" in both.printed
    assert said in both.printed
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_differences_are_named() -> None:
    first = {"option": {"seed": 0, "method": {"rank": 2}}, "data": "a"}
    assert differences(first, first) == []
    other = {"option": {"seed": 0, "method": {"rank": 3}}, "data": "a", "more": 1}
    assert differences(first, other) == ["option method rank is 3, not 2", "more is 1, not None"]


OTHERS: dict[str, Callable[..., None]] = {"evaluate": evaluated, "memory": memory, "gradients": gradients}

if __name__ == "__main__":
    place, calls = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    batches = []
    for folder_name, what, given in calls:
        if what in OTHERS:
            OTHERS[what](Path(place, folder_name), **given)
        else:
            batches.append(train(Path(place, folder_name), what, **given))
    Path(place, f"seen-{os.environ['RANK']}").write_text(json.dumps(batches))
    torch.distributed.barrier()  # a process that leaves first can abort the other
    torch.distributed.destroy_process_group()
