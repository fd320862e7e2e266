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

import re
from typing import Any

from ptmoe.tasks.base import Example, Format, Origin, Split
from ptmoe.tasks.expressions import last_boxed
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.prompts import WordProblems, word_problem
from ptmoe.tasks.records import name_of, text_of

FIRST = 500
_OPTION = re.compile(r"\b([a-e]) \) *(.*?)(?=[\s,.'\"\]]*(?:\b[a-e] \) |$))", re.DOTALL)


def example(record: dict[str, Any], origin: Origin) -> Example:
    if "Problem" in record or "options" in record:
        question, options = text_of(record, "Problem"), dict(_OPTION.findall(text_of(record, "options")))
        correct = text_of(record, "correct").strip()
        answer = options.get(correct, "").strip()
        if not answer:
            raise BadRecordError(f"the correct option {correct!r} is not among {', '.join(options) or 'none'}")
    else:
        question = text_of(record, "question" if "question" in record else "problem")
        answer = text_of(record, "answer") if "answer" in record else _boxed(text_of(record, "solution"))
    name, final = name_of(record, "id", origin.id), answer.rpartition("####")[2].strip()
    return word_problem(origin, name, question, answer=final, target=f" #### {answer}")


def _boxed(solution: str) -> str:
    boxed = last_boxed(solution)
    if boxed is None:
        raise BadRecordError("the solution has no \\boxed{…} answer, and there is no 'answer'")
    return boxed[1]


_FILES = ("math_problems.json", "math_problems.jsonl", "test.json", "test.jsonl", "train.json")
_KEYS = ("problem solution", "problem answer", "question answer", "Problem options correct")

TASKS = (
    WordProblems(
        name="math_problems",
        splits={"test": Split(FIRST, _FILES)},
        licence="unknown",
        source="not established",
        formats=(Format("MATH_PROBLEMS' JSON or JSON lines", "[{", _KEYS, example, first=FIRST),),
        note="the first 500; no known copy on the Hub: give a file with --data-dir",
    ),
)
