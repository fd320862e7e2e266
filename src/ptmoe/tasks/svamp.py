"""SVAMP: variations on simple problems, of four types (Patel et al., arXiv:2103.07191).

    {"ID": "chal-1", "Body": "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack",
     "Question": "How much do you have to pay to buy each pack?", "Equation": "( 76.0 - 25.0 )", "Answer": 51.0,
     "Type": "Subtraction"}

`SVAMP.json` of github.com/arkilpatel/SVAMP is a JSON array of 1,000 problems without a split: all of them are `test`.
The 300 that papers report are the test split of the Hub's copy, or any list of ids with `--ids`. In one record the type
is misspelt `Common-Divison`; it counts as division, like the other 165.
"""

from typing import Any

from ptmoe.tasks.base import Example, Format, Hub, Origin, Split
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.prompts import WordProblems, word_problem
from ptmoe.tasks.records import number_text, text_of

TYPES = {
    "Addition": "addition",
    "Subtraction": "subtraction",
    "Multiplication": "multiplication",
    "Common-Division": "division",
    "Common-Divison": "division",
}


def example(record: dict[str, Any], origin: Origin) -> Example:
    kind = text_of(record, "Type")
    if kind not in TYPES:
        raise BadRecordError(f"unknown Type {kind!r}: needs one of {', '.join(TYPES)}")
    sentences = text_of(record, "Body", may_be_empty=True), text_of(record, "Question")
    answer = number_text(text_of(record, "Answer"))
    name, equation = text_of(record, "ID"), record.get("Equation", "")
    return word_problem(origin, name, *sentences, answer=answer, equation=equation, domain=TYPES[kind])


TASKS = (
    WordProblems(
        name="svamp",
        splits={"train": Split(700, hub="train"), "test": Split(1000, ("SVAMP.json",), hub="test")},
        licence="MIT",
        source="github.com/arkilpatel/SVAMP",
        formats=(Format("SVAMP's JSON", "[", ("ID Body Question Type",), example),),
        hub=Hub("ChilleD/SVAMP", example),
        disjoint=True,
        note="SVAMP.json has no split: test is all of it; the Hub's test is 300",
    ),
)
