"""Every way to start several processes that docs/scale.md names, as it is written there, the environment untouched."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ptmoe import PtmoeError
from ptmoe.cli.launch import without_launch
from ptmoe.models.sharding import sharding_asked_for
from testing.processes import ENVIRONMENT, Launched, launched, needs_proc, state, torchrun

PTMOE = [sys.executable, "-m", "ptmoe"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
# 33 examples in fours: a batch of one is left, and the second epoch begins within the steps.
CHOSEN = ["--task", "nano/mixed", "--max-examples", "33", "--batch-size", "4", "--max-steps", "7", "--method", "pt-moe"]
CHOSEN += [
    "--router-noise",
    "0",
    "--recipe",
    "paper",
    "--logging-steps",
    "1",
    "--eval-examples",
    "9",
    "--dtype",
    "float32",
]
ANSWERS = ["--task", "nano/mixed", "--examples", "23", "--batch-size", "2"]
LONG = ["--task", "nano/mixed", "--method", "pt", "--max-steps", "100000", "--eval-examples", "4", "--batch-size", "2"]
FSDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_offload_params": False,
    },
    "machine_rank": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": False,
}
ZERO3 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {
        "gradient_accumulation_steps": 1,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": True,
        "zero_stage": 3,
    },
    "machine_rank": 0,
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": False,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that accumulates two batches, and beside it, in `answers`, its own evaluation."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    launched(*PTMOE, "train", *CHOSEN, "--gradient-accumulation-steps", "2", "--output-dir", str(folder))
    launched(*PTMOE, "eval", str(folder), *ANSWERS, "--output-dir", str(folder.parent / "answers"))
    return folder


def check_same_run(first: Path, other: Path) -> None:
    """Adapter and loss curve, within what floats allow."""
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, other)]
    for name, value in tensors[0].items():
        assert torch.allclose(tensors[1][name], value, atol=1e-4, rtol=1e-4), name
    lines = [map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) for folder in (first, other)]
    curves = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert len(curves[0]) == 7
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)
    made = [len((folder / "predictions" / "nano__mixed.jsonl").read_text().splitlines()) for folder in (first, other)]
    assert made == [9, 9]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [[*torchrun(), "-m", "ptmoe"], [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "-m", "ptmoe"], PTMOE],
    ids=["torchrun", "accelerate", "launch"],
)
def test_every_launcher_trains_and_evaluates_as_one_process(alone: Path, tmp_path: Path, launcher: list[str]) -> None:
    extra = ["--launch", "2"] if launcher == PTMOE else []
    run = tmp_path / "run"
    launched(*launcher, "train", *CHOSEN, "--output-dir", str(run), *extra)
    check_same_run(alone, run)
    one, together = alone.parent / "answers", tmp_path / "together"
    launched(*launcher, "eval", str(alone), *ANSWERS, "--output-dir", str(together), *extra)
    for path in (one / "predictions").iterdir():
        assert (together / "predictions" / path.name).read_bytes() == path.read_bytes()
    found = [json.loads((folder / "eval" / "nano__mixed.json").read_text()) for folder in (one, together)]
    assert all(summary.pop("seconds") > 0 for summary in found)
    assert found[0] == found[1]
    assert found[0]["routing"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--fsdp", "fsdp.yaml", "zero3.yaml"])
def test_a_sharded_base_trains_the_same_adapter(alone: Path, tmp_path: Path, how: str) -> None:
    if how == "zero3.yaml":
        pytest.importorskip("deepspeed")
    run = tmp_path / "run"
    command = ["train", *CHOSEN, "--output-dir", str(run)]
    if how == "--fsdp":
        launched(*PTMOE, *command, "--launch", "2", "--fsdp")
    else:
        (tmp_path / how).write_text(yaml.safe_dump(FSDP if how == "fsdp.yaml" else ZERO3))
        launched(*ACCELERATE, "--config_file", str(tmp_path / how), "-m", "ptmoe", *command)
    check_same_run(alone, run)
    assert "gather" in json.loads((run / "environment.json").read_text())["fast_paths"]["loss_in_parts"]


@pytest.mark.slow
def test_two_nodes_meet_at_torchs_rendezvous(alone: Path, tmp_path: Path) -> None:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        port = opened.getsockname()[1]
    meeting = ["--nnodes", "2", "--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "1", "-m", "ptmoe", "train"]
    command += [*CHOSEN, "--output-dir", str(tmp_path / "run")]
    nodes = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(node.communicate(timeout=300)[1], node.returncode) for node in nodes]
    assert [status for _, status in ended] == [0, 0], ended
    check_same_run(alone, tmp_path / "run")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_all_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    both = Launched(tmp_path, *PTMOE, "train", *LONG, "--output-dir", str(run), "--launch", "2")
    both.wait_for((run / "metrics.jsonl").exists)
    pids = both.pids()
    both.process.send_signal(number)
    assert both.process.wait(timeout=60) == 128 + number
    assert len(pids) == 2
    assert all(state(pid) in ("", "Z") for pid in pids)
    assert f"error: {number.name} ended training at step" in both.printed
    assert "Traceback" not in both.printed
    assert any((run / "checkpoints").glob("checkpoint-*"))


@needs_proc
@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_the_launcher(tmp_path: Path) -> None:
    run = tmp_path / "run"
    both = Launched(tmp_path, *PTMOE, "train", *LONG, "--output-dir", str(run), "--launch", "2")
    both.wait_for((run / "metrics.jsonl").exists)
    pids = both.pids()
    started = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert both.process.wait(timeout=60) == 128 + signal.SIGKILL
    assert time.monotonic() - started < 60
    assert state(pids[0]) in ("", "Z")
    assert "Traceback" not in both.printed


@pytest.mark.slow
def test_an_error_of_a_process_is_a_message_and_a_status(tmp_path: Path) -> None:
    command = [
        "train",
        "--data",
        str(tmp_path / "missing.jsonl"),
        "--output-dir",
        str(tmp_path / "run"),
        "--launch",
        "2",
    ]
    both = Launched(tmp_path, *PTMOE, *command)
    assert both.process.wait(timeout=100) == 2
    assert "missing.jsonl" in both.printed
    assert "Traceback" not in both.printed
    assert not (tmp_path / "run").exists()


def test_a_launch_of_several_that_starts_one_is_refused(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What `accelerate launch --num_processes 2` sets on a machine without accelerators.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for command in (["train", *CHOSEN], ["eval", "--model", "nano", "--task", "nano/mixed"]):
        status, _, error = run(*command, "--output-dir", str(tmp_path / "run"))
        assert status == 2
        assert "error: accelerate launch was asked for several processes and started one" in error
        assert "add --multi_gpu" in error


def test_launch_is_taken_out_of_the_command() -> None:
    for given in (["--launch", "2"], ["--launch=2"]):
        assert without_launch(["train", *given, "--seed", "2"]) == ["train", "--seed", "2"]
    assert without_launch(["train"]) == ["train"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "1"}, "fsdp shares the base among several processes, and this is one: start more"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp within a DeepSpeed launch"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: true is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient-checkpointing instead"),
    ],
)
def test_sharding_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    assert sharding_asked_for() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sharding_asked_for(fsdp=True) == "fsdp"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PtmoeError, match=said):
        sharding_asked_for(fsdp=True)
