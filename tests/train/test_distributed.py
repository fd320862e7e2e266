"""Two processes train as one does that accumulates their batches.

Run by `torch.distributed.run`, this file is one of the two.
"""

import json
import os
import subprocess
import sys
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
    for name, value in load_file(other / "trained").items():
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


if __name__ == "__main__":
    place, name, given = json.loads(sys.argv[1])
    batches = train(Path(place), name, **given)
    Path(place, f"seen-{os.environ['RANK']}").write_text(json.dumps(batches))
    torch.distributed.barrier()  # a process that leaves first can abort the other
    torch.distributed.destroy_process_group()
