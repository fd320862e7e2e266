"""Answer every example greedily, grade it, and say which expert it was routed to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.routing import summarise_routing
from ptmoe.tasks.metrics import exact_match
from ptmoe.train.data import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.model import PromptedCausalLM
    from ptmoe.tasks.base import Example

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Prediction:
    """One answered example; `gate` is None for a method that does not route."""

    id: str
    prompt: str
    completion: str
    references: list[str]
    right: bool
    domain: str
    gate: list[float] | None


@dataclass(frozen=True)
class Evaluation:
    """All of a task's predictions, in the examples' order, and the seconds they took."""

    task: str
    predictions: list[Prediction]
    seconds: float

    @property
    def accuracy(self) -> float:
        """In percent."""
        return _percent(self.predictions)

    def summary(self, expert_similarity: list[list[float]] | None = None) -> dict[str, Any]:
        """What `eval/TASK.json` holds."""
        domains = sorted({prediction.domain for prediction in self.predictions})
        parts = {domain: [p for p in self.predictions if p.domain == domain] for domain in domains}
        return {
            "task": self.task,
            "examples": len(self.predictions),
            "metrics": {"accuracy": self.accuracy},
            "interval": {"accuracy": bootstrap_interval([p.right for p in self.predictions])},
            "by_domain": {
                domain: {"examples": len(part), "accuracy": _percent(part)} for domain, part in parts.items() if domain
            },
            "routing": summarise_routing(
                [p.gate for p in self.predictions], [p.domain for p in self.predictions], expert_similarity
            ),
            "seconds": round(self.seconds, 3),
        }

    def write(self, folder: Path, expert_similarity: list[list[float]] | None = None) -> None:
        """`eval/TASK.json` and `predictions/TASK.jsonl` in a run folder; a task that is a file goes by its name."""
        name = Path(self.task).stem if self.task.endswith(".jsonl") else self.task.replace("/", "__")
        for part in ("eval", "predictions"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with (folder / "predictions" / f"{name}.jsonl").open("w") as opened:
            for prediction in self.predictions:
                opened.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
        (folder / "eval" / f"{name}.json").write_text(json.dumps(self.summary(expert_similarity), indent=2) + "\n")


def _percent(predictions: Sequence[Prediction]) -> float:
    return 100 * sum(prediction.right for prediction in predictions) / len(predictions)


def bootstrap_interval(marks: Sequence[bool]) -> list[float]:
    """The 95 % percentile interval of a mean, in percent, over resampled examples; the same for the same marks."""
    drawn = np.random.default_rng(0).binomial(len(marks), sum(marks) / len(marks), BOOTSTRAP_SAMPLES) / len(marks)
    return [float(100 * edge) for edge in np.quantile(drawn, (0.025, 0.975))]


def evaluate(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Greedy answers to `examples`, graded by exact match.

    Args:
        model: with its active adapter.
        tokenizer: the base's.
        examples: at least one.
        batch_size: rows at once; the longest inputs come first.
        max_new_tokens: of each answer.
        progress: called with the examples done and all of them, after each batch.
    """
    if not examples:
        raise PtmoeError("no examples to evaluate")
    started = time.monotonic()
    was_training = model.training
    model.eval()
    answered: dict[int, Prediction] = {}
    try:
        for index, prediction in _answers(model, tokenizer, examples, batch_size, max_new_tokens):
            answered[index] = prediction
            if progress is not None and (len(answered) % batch_size == 0 or len(answered) == len(examples)):
                progress(len(answered), len(examples))
    finally:
        model.train(was_training)
    in_order = [answered[index] for index in range(len(examples))]
    return Evaluation(examples[0].task, in_order, time.monotonic() - started)


@torch.no_grad()
def _answers(
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
) -> Iterator[tuple[int, Prediction]]:
    prompts = [prompt_ids(example, tokenizer) for example in examples]
    order = sorted(range(len(examples)), key=lambda index: -len(prompts[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        longest = len(prompts[chunk[0]])
        rows = [[pad] * (longest - len(prompts[i])) + prompts[i] for i in chunk]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk], device=ids.device
        )
        routing = model.route(ids, mask)
        gates = None if routing is None else routing.gate.tolist()
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
        )
        texts = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
        for row, (index, text) in enumerate(zip(chunk, texts, strict=True)):
            example = examples[index]
            yield (
                index,
                Prediction(
                    id=example.id,
                    prompt=example.input,
                    completion=text,
                    references=list(example.references),
                    right=exact_match(text, example.references),
                    domain=example.domain,
                    gate=None if gates is None else [round(value, 6) for value in gates[row]],
                ),
            )
