r"""GSM8K: grade-school problems with worked solutions (Cobbe et al., arXiv:2110.14168).

    {"question": "Natalia sold clips to 48 of her friends in April, and then …", "answer": "Natalia sold 48/2 =
     <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether …\n#### 72"}

One JSON object a line, `train.jsonl` and `test.jsonl` of github.com/openai/grade-school-math, or an array of them. The
calculator annotations `<<…>>` are part of the answer and are kept. The last line is the final answer: `#### 72`.
"""

from typing import Any

from ptmoe.tasks.base import Example, Format, Hub, Origin, Split
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.prompts import WordProblems, word_problem
from ptmoe.tasks.records import text_of


def example(record: dict[str, Any], origin: Origin) -> Example:
    solution = text_of(record, "answer")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise BadRecordError(f"the answer {solution[-30:]!r} does not end with '#### n'")
    return word_problem(origin, origin.id, text_of(record, "question"), answer=answer.strip(), target=f" {solution}")


TASKS = (
    WordProblems(
        name="gsm8k",
        splits={
            "train": Split(7473, ("train.jsonl",), hub="train"),
            "test": Split(1319, ("test.jsonl",), hub="test"),
        },
        licence="MIT",
        source="github.com/openai/grade-school-math",
        formats=(Format("GSM8K's JSON lines", "{[", ("question answer",), example),),
        hub=Hub("openai/gsm8k", example, config="main"),
    ),
)
