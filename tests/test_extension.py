"""A method, a task and a metric that only this file knows are trained, evaluated, compared and reported.

Each is registered by one line; nothing else in the package is touched.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from ptmoe.cli.console import Console
from ptmoe.compare import compare, prepare, read_plan
from ptmoe.methods import METHODS
from ptmoe.methods.base import InitialEmbeddings, Prompt, PromptConfig, PromptEncoder
from ptmoe.report import comparison_summary, read_comparison, write_report
from ptmoe.tasks import TASKS, load_task, score
from ptmoe.tasks.base import Example, Split, Task
from ptmoe.tasks.metrics import GRADERS
from ptmoe.train import TrainOptions, train


class MirroredConfig(PromptConfig):
    """P = [p ; reversed p]: `T·H / 2` trainable parameters."""

    method: ClassVar[str] = "mirrored"

    def build(self, hidden_size: int) -> "Mirrored":
        return Mirrored(self, hidden_size)


class Mirrored(PromptEncoder):
    def __init__(self, config: MirroredConfig, hidden_size: int) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.empty(config.num_virtual_tokens // 2, hidden_size))

    def forward(self, input_embeds: Tensor, input_mask: Tensor) -> Prompt:
        return Prompt(torch.cat([self.prompt, self.prompt.flip(0)]).expand(len(input_embeds), -1, -1))

    @torch.no_grad()
    def initialise(self, source: InitialEmbeddings) -> None:
        self.prompt.copy_(source.rows(self.config, len(self.prompt)))


def numbers(name: str, split: str) -> Iterator[Example]:
    """Repeat the number, in two domains."""
    for number in range(40 if split == "train" else 10):
        domain = ("harbor", "market")[number % 2]
        yield Example(f"{split}-{number}", f"{domain}: {number} =>", f" {number}", (str(number),), name, domain=domain)


NUMBERS = Task(
    name="numbers",
    splits={"train": Split(40), "validation": Split(10), "test": Split(10)},
    grader="shared digits",
    metric="digit_recall",
    max_new_tokens=6,
    licence="Apache-2.0",
    source="made up for a test",
    chat=False,
    generate=numbers,
)


def shared_digits(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """The share of the reference's digits that the prediction has, and whether it has any digit at all."""
    digits = set(references[0])
    return {
        "digit_recall": len(digits & set(prediction)) / len(digits),
        "numeric": float(any(map(str.isdigit, prediction))),
    }


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "mirrored", MirroredConfig)
    monkeypatch.setitem(TASKS, "numbers", NUMBERS)
    monkeypatch.setitem(GRADERS, "shared digits", shared_digits)


@pytest.mark.ci
def test_they_are_trained_evaluated_and_reported_as_one_run(tmp_path):
    folder = tmp_path / "run"
    method = {"name": "mirrored", "num_virtual_tokens": 6}
    trained = train(
        TrainOptions(task="numbers", method=method, max_steps=2, output_dir=str(folder)), say=lambda _: None
    )
    assert trained.result.trainable_parameters == 3 * 192
    summary = json.loads((folder / "eval" / "numbers.json").read_text())
    assert summary["metric"] == "digit_recall"
    assert summary["metrics"].keys() == {"digit_recall", "numeric"}
    assert summary["by_domain"].keys() == {"harbor", "market"}
    lines = [json.loads(line) for line in (folder / "predictions" / "numbers.jsonl").read_text().splitlines()]
    examples = load_task("numbers", "test")
    assert score("numbers", {line["id"]: line["completion"] for line in lines}, examples) == summary["metrics"]


@pytest.mark.slow
def test_they_are_compared_and_stand_in_the_report(tmp_path):
    plan = {
        "methods": [{"name": "mirrored", "num_virtual_tokens": 6}, {"name": "pt", "num_virtual_tokens": 3}],
        "tasks": ["numbers"],
        "seeds": 2,
        "max_steps": 2,
        "jobs": 1,
        "output_dir": str(tmp_path / "c"),
    }
    assert not compare(prepare(read_plan(None, plan), say=lambda _: None))
    comparison = read_comparison(tmp_path / "c")
    assert comparison.labels == ["pt", "mirrored"] or comparison.labels == ["mirrored", "pt"]
    page = write_report(tmp_path / "c").read_text()
    for word in ("mirrored", "numbers", "digit recall", "numeric", "harbor"):
        assert word in page
    with (tmp_path / "c" / "tables" / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {"digit_recall", "numeric"}
    assert {"harbor", "market"} <= {row["of"] for row in rows}
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(comparison_summary(tmp_path / "c"))
    printed = console.export_text()
    assert "mirrored" in printed
    assert "digit recall" in printed
