"""Grading predictions without a model: means, their bootstrap intervals, and a task's domains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ptmoe.errors import PtmoeError
from ptmoe.tasks.base import Example, Task
from ptmoe.tasks.loading import task_named
from ptmoe.tasks.metrics import GRADERS
from ptmoe.tasks.resampling import Group, bootstrap_interval

Marks = dict[str, float]  # by metric, from 0 to 1


def score(
    name: str,
    predictions: Sequence[str] | Mapping[str, str],
    examples: Iterable[Example],
    *,
    missing_as_wrong: bool = False,
) -> dict[str, float]:
    """Grade predictions as the data set's own evaluator does, in percent.

    Args:
        name: a task, as for `load_task`.
        predictions: in the examples' order, or by example id.
        examples: that the predictions answer.
        missing_as_wrong: an example without a prediction scores 0, as in MRQA's and SQuAD's evaluators.

    Returns:
        `{"accuracy": …}`, or for question answering `{"exact_match": …, "f1": …}`.

    Raises:
        PtmoeError: no examples, or predictions that do not cover exactly these examples.
    """
    return means(grade(name, predictions, examples, missing_as_wrong=missing_as_wrong))


def grade(
    name: str,
    predictions: Sequence[str] | Mapping[str, str],
    examples: Iterable[Example],
    *,
    missing_as_wrong: bool = False,
) -> list[Marks]:
    """Each example's scores, from 0 to 1; otherwise as `score`."""
    examples = list(examples)
    if not examples:
        raise PtmoeError(f"no examples of {name!r} to score")
    texts: Sequence[str | None]
    if isinstance(predictions, Mapping):
        texts = [predictions.get(example.id) for example in examples]
        missing = [] if missing_as_wrong else [e.id for e in examples if e.id not in predictions]
        unknown = sorted(predictions.keys() - {example.id for example in examples})
        if missing or unknown:
            raise PtmoeError(
                f"predictions lack {len(missing)} id(s) {missing[:3]} and hold {len(unknown)} unknown id(s) "
                f"{unknown[:3]}: give one prediction for each example"
            )
    else:
        texts = predictions
    if len(texts) != len(examples):
        raise PtmoeError(f"{len(texts)} predictions for {len(examples)} examples: give one for each")
    grader = GRADERS[task_named(name).grader]
    marks = []
    for text, example in zip(texts, examples, strict=True):
        scores = grader(text or "", example.references)
        marks.append(dict.fromkeys(scores, 0.0) if text is None else scores)
    return marks


def summarise(task: Task, split: str, marks: Sequence[Marks], domains: Sequence[str]) -> dict[str, Any]:
    """The results of a task from the marks of its examples.

    Args:
        task: whose examples were graded.
        split: of the task.
        marks: of each example, at least one.
        domains: of each example, in the same order.

    Returns:
        `metrics` in percent with the 95 % `interval` of each; `by_domain`, the same means for each domain; and
        `mean_of_domains`, their unweighted mean, as the PT-MoE paper reports SVAMP.
    """
    parts = {name: [mark for mark, of in zip(marks, domains, strict=True) if of == name] for name in sorted({*domains})}
    by_domain = {name: {"examples": len(part), **means(part)} for name, part in parts.items() if name}
    return {
        "task": task.name,
        "split": split,
        "examples": len(marks),
        "metric": task.metric,
        "metrics": means(marks),
        "interval": {
            name: bootstrap_interval([Group(1.0, np.array([100 * mark[name] for mark in marks]))]) for name in marks[0]
        },
        "by_domain": by_domain,
        "mean_of_domains": {
            name: sum(part[name] for part in by_domain.values()) / len(by_domain) for name in marks[0] if by_domain
        },
    }


def means(marks: Sequence[Marks]) -> Marks:
    """The mean of each metric, in percent."""
    return {name: 100 * sum(mark[name] for mark in marks) / len(marks) for name in marks[0]}
