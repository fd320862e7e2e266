"""Grading predictions without a model: means, their bootstrap intervals, and a task's domains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ptmoe.errors import PtmoeError
from ptmoe.tasks.base import Example, Task
from ptmoe.tasks.labels import Answers, Counts, confusion, macro_f1_interval, mean_macro_f1
from ptmoe.tasks.loading import TASKS, task_named, task_names
from ptmoe.tasks.metrics import MACRO_F1, mark
from ptmoe.tasks.resampling import Group, bootstrap_interval

Marks = dict[str, float]  # by metric, from 0 to 1


def score(
    name: str,
    predictions: Sequence[str | None] | Mapping[str, str | None],
    examples: Iterable[Example],
    *,
    missing_as_wrong: bool = False,
) -> dict[str, float]:
    """Grade predictions as the task says, in percent.

    Args:
        name: a task, as for `load_task`.
        predictions: in the examples' order, or by example id; None scores 0.
        examples: that the predictions answer.
        missing_as_wrong: an example without a prediction scores 0, as in MRQA's and SQuAD's evaluators.

    Returns:
        `{"accuracy": …}`, for question answering `{"exact_match": …, "f1": …}`, and for a classification `{"accuracy":
        …, "macro_f1": …}`.

    Raises:
        PtmoeError: no examples, predictions that do not cover exactly these examples, or tasks that are graded in
            different ways.
    """
    examples = list(examples)
    marks = grade(name, predictions, examples, missing_as_wrong=missing_as_wrong)
    ids = [example.id for example in examples]
    texts = list(map(predictions.get, ids)) if isinstance(predictions, Mapping) else predictions
    answers = [(text, example.references) for text, example in zip(texts, examples, strict=True)]
    return overall(grading_task(name), marks, answers, [example.domain for example in examples])


def grading_task(name: str) -> Task:
    """The task that grades all that a name stands for, under that name.

    Raises:
        PtmoeError: an unknown task, or a mixture of tasks that are graded in different ways.
    """
    tasks = [task_named(each) for each in task_names(name)]
    if len({(task.grader, task.labels) for task in tasks}) > 1:
        raise PtmoeError(f"{name} is of tasks that are graded in different ways: score each by itself")
    return replace(tasks[0], name=name)


def grade(
    name: str,
    predictions: Sequence[str | None] | Mapping[str, str | None],
    examples: Iterable[Example],
    *,
    missing_as_wrong: bool = False,
) -> list[Marks]:
    """Each example's scores, from 0 to 1; otherwise as `score`."""
    examples, grader = list(examples), grading_task(name).grader
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
    marks = []
    for text, example in zip(texts, examples, strict=True):
        scores = mark(grader, text or "", example.references)
        marks.append(dict.fromkeys(scores, 0.0) if text is None else scores)
    return marks


def summarise(
    task: Task, split: str, marks: Sequence[Marks], answers: Answers, domains: Sequence[str]
) -> dict[str, Any]:
    """The results of a task from the marks of its examples, of which there is at least one, the answers to them and
    their domains, all in the same order.

    Returns:
        `metrics` in percent with the 95 % `interval` of each; `by_domain`, the same for each domain;
        `mean_of_domains`, their unweighted mean, as the PT-MoE paper reports SVAMP; and `no_label`, how many answers
        are no label of a classification.
    """
    by_domain: dict[str, dict[str, Any]] = {}
    for name in sorted({*domains} - {""}):
        inside = [index for index, domain in enumerate(domains) if domain == name]
        of_domain = [marks[index] for index in inside], [answers[index] for index in inside]
        by_domain[name] = {"examples": len(inside), **overall(task, *of_domain, [name] * len(inside))}
    metrics = overall(task, marks, answers, domains)
    interval = {
        name: bootstrap_interval([Group(1.0, np.array([100 * mark[name] for mark in marks]))]) for name in marks[0]
    }
    tables = _tables(task, answers, domains)
    if tables:
        interval[MACRO_F1] = macro_f1_interval(tables)
    missing = sum(text is None for text, _ in answers)
    return {
        "task": task.name,
        "split": split,
        "examples": len(marks),
        "metric": task.metric,
        "metrics": metrics,
        "interval": interval,
        "by_domain": by_domain,
        "mean_of_domains": {
            name: sum(part[name] for part in by_domain.values()) / len(by_domain) for name in metrics if by_domain
        },
        "no_label": sum(int(counts[:, -1].sum()) for counts in tables) - missing if tables else 0,
    }


def overall(task: Task, marks: Sequence[Marks], answers: Answers, domains: Sequence[str]) -> Marks:
    """All metrics of a task, in percent: means over the examples, and what only all answers together have."""
    tables = _tables(task, answers, domains)
    return means(marks) | ({MACRO_F1: mean_macro_f1(tables)} if tables else {})


def _tables(task: Task, answers: Answers, domains: Sequence[str]) -> list[Counts]:
    """The answers of a classification, or of each part of a mixture of them."""
    if not task.parts:
        return [confusion(task.labels, answers)] if task.labels else []
    parts = {name: TASKS[name].labels for name in sorted({*domains})}
    if not all(parts.values()):
        return []
    return [
        confusion(labels, [answer for answer, domain in zip(answers, domains, strict=True) if domain == name])
        for name, labels in parts.items()
    ]


def means(marks: Sequence[Marks]) -> Marks:
    """The mean of each metric, in percent."""
    return {name: 100 * sum(mark[name] for mark in marks) / len(marks) for name in marks[0]}
