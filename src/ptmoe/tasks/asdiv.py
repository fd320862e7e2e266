"""ASDiv: primary-school problems in diverse wordings (Miao et al., arXiv:2106.15772).

    <Problem ID="nluds-0001" Grade="1" Source="http://www.k5learning.com">
        <Body>Seven red apples and two green apples are in the basket.</Body>
        <Question>How many apples are in the basket?</Question>
        <Solution-Type>Addition</Solution-Type>
        <Answer>9 (apples)</Answer>
        <Formula>7+2=9</Formula>
    </Problem>

`ASDiv.xml` of github.com/chaochun/nlu-asdiv-dataset: 2,305 problems without a split. An answer may be a word or several
numbers, each with its unit in parentheses, and is graded accordingly. The Hub's copy has neither ids nor grades: there
a problem's index is its id.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Hub, Origin, Split, Task
from ptmoe.tasks.records import Format, Problems, Record, text_of, xml_elements


def example(record: dict[str, Any], origin: Origin) -> Example:
    return _example(record, origin, text_of(record, "ID"), ("Body", "Question", "Answer"))


def hub_example(record: dict[str, Any], origin: Origin) -> Example:
    return _example(record, origin, origin.id, ("body", "question", "answer"))


def _example(record: dict[str, Any], origin: Origin, name: str, keys: tuple[str, str, str]) -> Example:
    body, question, answer = (text_of(record, key, may_be_empty=key is keys[0]) for key in keys)
    return Example(
        id=name,
        input=prompts.problem(body, question),
        target=prompts.solution(answer),
        references=(answer,),
        task=origin.task,
    )


def _problems(path: Path, problems: Problems) -> Iterator[Record]:
    return xml_elements(path, problems, name="Problem")


TASKS = (
    Task(
        name="asdiv",
        splits={"test": Split(2305, ("ASDiv.xml",), hub="validation")},
        grader="mathematics",
        metric="accuracy",
        max_new_tokens=512,
        until=("\nQuestion:",),
        licence="CC BY-NC 4.0",
        source="github.com/chaochun/nlu-asdiv-dataset",
        formats=(
            Format(
                "ASDiv's XML",
                "<",
                lambda keys: bool(keys & {"Machine-Reading-Corpus-File", "ProblemSet"}),
                _problems,
                example,
            ),
        ),
        hub=Hub("EleutherAI/asdiv", hub_example, config="asdiv"),
        note="papers that report 301 use a split of their own: give it with --ids",
    ),
)
