r"""GSM8K: grade-school problems with worked solutions (Cobbe et al., arXiv:2110.14168).

    {"question": "Natalia sold clips to 48 of her friends in April, and then …", "answer": "Natalia sold 48/2 =
     <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether …\n#### 72"}

One JSON object a line, `train.jsonl` and `test.jsonl` of github.com/openai/grade-school-math. The calculator
annotations `<<…>>` are part of the answer and are kept. The last line is the final answer: `#### 72`.
"""

from __future__ import annotations

from typing import Any

from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Hub, Origin, Split, Task
from ptmoe.tasks.records import BadRecordError, Format, json_lines, text_of


def example(record: dict[str, Any], origin: Origin) -> Example:
    answer = text_of(record, "answer")
    _, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise BadRecordError(f"the answer {answer[-30:]!r} does not end with '#### n'")
    return Example(
        id=origin.id,
        input=prompts.problem(text_of(record, "question")),
        target=f" {answer}",
        references=(final.strip(),),
        task=origin.task,
    )


FORMAT = Format("GSM8K's JSON lines", "{", lambda keys: keys >= {"question", "answer"}, json_lines, example)

TASKS = (
    Task(
        name="gsm8k",
        splits={
            "train": Split(7473, ("train.jsonl",), hub="train"),
            "test": Split(1319, ("test.jsonl",), hub="test"),
        },
        grader="mathematics",
        metric="accuracy",
        max_new_tokens=512,
        until=("\nQuestion:",),
        licence="MIT",
        source="github.com/openai/grade-school-math",
        formats=(FORMAT,),
        hub=Hub("openai/gsm8k", example, config="main"),
    ),
)
