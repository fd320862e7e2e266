r"""MATH_PROBLEMS, of which the PT-MoE paper uses the first 500 (arXiv:2505.09519, "MP500").

    {"Problem": "a multiple choice test consists of 4 questions , …", "options": "a ) 24 , b ) 120 , c ) 625 , d ) 720 ,
     e ) 1024", "correct": "c", …}
    {"question": "…", "answer": "…"}
    {"problem": "…", "solution": "… \boxed{625} …"}

The first is MathQA's form (Amini et al., arXiv:1905.13319); each may be a JSON array, or one object a line. The origin
of the data set could not be established and no public copy was found, so nothing is downloaded by default. A file in
one of these forms is read with `--data-dir`; `test` is its first 500 records. The question is asked without MathQA's
options: the value of the correct option is the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Origin, Split, Task
from ptmoe.tasks.records import BadRecordError, Format, Problems, Record, json_array, json_lines, text_of

FIRST = 500
_OPTION = re.compile(r"\b([a-e]) \) *(.*?)(?=\W*\b[a-e] \) |\W*$)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def example(record: dict[str, Any], origin: Origin) -> Example:
    if "options" in record:
        question, answer = text_of(record, "Problem"), _right_option(record)
    else:
        question = text_of(record, "question" if "question" in record else "problem")
        answer = text_of(record, "answer") if "answer" in record else _final(text_of(record, "solution"))
    return Example(
        id=str(record.get("id", origin.id)),
        input=prompts.problem(question),
        target=prompts.solution(answer),
        references=(answer.rpartition("####")[2].strip(),),
        task=origin.task,
    )


def _right_option(record: dict[str, Any]) -> str:
    options = dict(_OPTION.findall(text_of(record, "options")))
    correct = text_of(record, "correct").strip()
    if not options.get(correct, "").strip():
        raise BadRecordError(f"the correct option {correct!r} is not among {', '.join(options) or 'none'}")
    return str(options[correct]).strip()


def _final(solution: str) -> str:
    boxed = _BOXED.findall(solution)
    if not boxed:
        raise BadRecordError("the solution has no \\boxed{…} answer, and there is no 'answer'")
    return str(boxed[-1])


def _recognise(keys: frozenset[str]) -> bool:
    named = keys >= {"problem", "solution"} or keys >= {"problem", "answer"} or keys >= {"question", "answer"}
    return named or keys >= {"Problem", "options", "correct"}


def _first(
    records: Callable[[Path, Problems], Iterator[Record]],
) -> Callable[[Path, Problems], Iterator[Record]]:
    return lambda path, problems: islice(records(path, problems), FIRST)


TASKS = (
    Task(
        name="math_problems",
        splits={
            "test": Split(FIRST, ("math_problems.json", "math_problems.jsonl", "test.json", "test.jsonl", "train.json"))
        },
        grader="mathematics",
        metric="accuracy",
        max_new_tokens=512,
        until=("\nQuestion:",),
        licence="unknown",
        source="not established",
        formats=(
            Format("MATH_PROBLEMS' JSON", "[", _recognise, _first(json_array), example),
            Format("MATH_PROBLEMS' JSON lines", "{", _recognise, _first(json_lines), example),
        ),
        note="the first 500; no known copy on the Hub: give a file with --data-dir",
    ),
)
