"""The tasks, one file for each family: read, prompt, score."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks import local, nano
from ptmoe.tasks.base import Example
from ptmoe.tasks.metrics import exact_match

TASKS: dict[str, tuple[str, ...]] = {name: tuple(nano.SPLITS) for name in nano.NAMES}

__all__ = ["TASKS", "Example", "load_task", "score"]


def load_task(name: str, split: str = "test", data_dir: str | Path | None = None) -> list[Example]:
    """The examples of a task.

    Args:
        name: a key of `TASKS`, or a JSON-lines file (`ptmoe.tasks.local` says what its lines hold).
        split: of a named task.
        data_dir: where the data set lies; nano's world is generated and needs none.

    Raises:
        PtmoeError: an unknown task or split, or bad data.
    """
    if name not in TASKS:
        if name.endswith(".jsonl") or Path(name).exists():
            return local.load(name)
        raise PtmoeError(f"unknown task {name!r}{near(name, TASKS)}; or give a JSON-lines file")
    if split not in TASKS[name]:
        raise PtmoeError(f"task {name!r} has no split {split!r}{near(split, TASKS[name])}")
    return list(nano.load(name, split))


def score(name: str, predictions: Sequence[str] | Mapping[str, str], examples: Iterable[Example]) -> dict[str, float]:
    """Grade predictions, in percent.

    Args:
        name: a task, as for `load_task`.
        predictions: in the examples' order, or by example id.
        examples: what was asked.

    Raises:
        PtmoeError: no examples, or predictions that do not cover exactly these examples.
    """
    examples = list(examples)
    if not examples:
        raise PtmoeError(f"no examples of {name!r} to score")
    if isinstance(predictions, Mapping):
        ids = [example.id for example in examples]
        missing, strange = set(ids) - set(predictions), set(predictions) - set(ids)
        if missing or strange:
            raise PtmoeError(
                f"predictions lack {len(missing)} id(s) {sorted(missing)[:3]} and hold {len(strange)} strange one(s) "
                f"{sorted(strange)[:3]}: give one for each example"
            )
        predictions = [predictions[key] for key in ids]
    if len(predictions) != len(examples):
        raise PtmoeError(f"{len(predictions)} predictions for {len(examples)} examples: give one for each")
    right = [exact_match(text, example.references) for text, example in zip(predictions, examples, strict=True)]
    return {"accuracy": 100 * sum(right) / len(right)}
