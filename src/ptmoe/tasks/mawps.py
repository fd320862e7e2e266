"""MAWPS: problems from several older collections (Koncel-Kedziorski et al., NAACL 2016), in the forms in circulation.

    Question,Numbers,Equation,Answer,…
    There are number0 short trees and number1 tall trees …,41.0 44.0 57.0,+ number0 number2,98,…
    {"iIndex": 1, "sQuestion": "Joan found 70.0 seashells …", "lEquations": ["X=(70.0-27.0)"], "lSolutions": [43.0]}
    {"id": 2351, "original_text": "A waiter had 22 customers …", "equation": "X=((22.0-14.0)/4.0)", "ans": 2.0}
    {"question": "…", "answer": "… #### 98"}

The CSV of github.com/arkilpatel/SVAMP, two JSON forms, and the rows of the Hub's garrethlee/MAWPS (355 in test). In the
CSV the placeholders `number0`, `number1` (in another copy `N_00`, `N_01`) stand for the numbers of the column
`Numbers`, separated by spaces; they are substituted, `41.0` as `41`. The target is the equation as a worked solution
(`ptmoe.tasks.equations`), here and in ASDiv and SVAMP.

Some problems stand in several splits: of the 398 to validate and test on in github.com/LYH-YF/MWPToolkit's copy, 28
stand in its training split. What is in `test` is left out of `validation` and `train`, what is in `validation` out of
`train`, up to case and white space.
"""

import re
from typing import Any

from ptmoe.tasks import gsm8k
from ptmoe.tasks.base import Example, Format, Hub, Origin, Split
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.prompts import WordProblems, word_problem
from ptmoe.tasks.records import name_of, number_text, text_of

_PLACEHOLDER = re.compile(r"\b(?:number|N_)(\d+)\b")
_NUMBER = re.compile(r"[^\s,]+(?:,\d{3}\b[^\s,]*)*")  # 1,000 is one


def csv_example(record: dict[str, Any], origin: Origin) -> Example:
    numbers = list(map(number_text, _NUMBER.findall(record.get("Numbers", ""))))

    def number(found: re.Match[str]) -> str:
        if int(found[1]) >= len(numbers):
            raise BadRecordError(f"{found[0]} has no number: Numbers holds {len(numbers)}")
        return numbers[int(found[1])]

    question, answer = _PLACEHOLDER.sub(number, text_of(record, "Question")), number_text(text_of(record, "Answer"))
    try:
        equation = _PLACEHOLDER.sub(number, record.get("Equation") or "").replace(",", "")
    except BadRecordError:  # as any equation that cannot be read
        equation = ""
    return word_problem(origin, origin.id, question, answer=answer, equation=equation)


def json_example(record: dict[str, Any], origin: Origin) -> Example:
    if "sQuestion" in record:
        solutions = record.get("lSolutions")
        solutions = solutions if isinstance(solutions, list) else [solutions]
        if not solutions:
            raise BadRecordError("'lSolutions' needs a list of numbers")
        numbers = [number_text(text_of({"lSolutions": solution}, "lSolutions")) for solution in solutions]
        name, question, answer = "iIndex", text_of(record, "sQuestion"), "; ".join(numbers)
        equations = record.get("lEquations")
        equation = equations[0] if isinstance(equations, list) and len(equations) == 1 else equations
    else:
        name, question, answer = "id", text_of(record, "original_text"), text_of(record, "ans")
        equation = record.get("equation", "")
    return word_problem(
        origin, name_of(record, name, origin.id), question, answer=number_text(answer), equation=equation
    )


TASKS = (
    WordProblems(
        name="mawps",
        splits={
            "train": Split(1417, ("train.csv", "train.json", "trainset.json"), hub="train"),
            "validation": Split(None, ("valid.csv", "valid.json", "validset.json")),
            "test": Split(
                355, ("test.csv", "test.json", "testset.json", "dev.csv", "MAWPS.json", "mawps.json"), hub="test"
            ),
        },
        licence="not stated",
        source="github.com/sroy9/mawps",
        formats=(
            Format("MAWPS's CSV", ",", ("Question Numbers Answer",), csv_example),
            Format("MAWPS's JSON or JSON lines", "[{", ("sQuestion lSolutions", "original_text ans"), json_example),
        ),
        hub=Hub("garrethlee/MAWPS", gsm8k.example),
        disjoint=True,
        note="sizes are those of the Hub's copy; train and validation leave out what stands in a later split",
    ),
)
