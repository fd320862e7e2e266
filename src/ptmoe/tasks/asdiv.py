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

ASDiv-A is its arithmetic part, 1,218 problems, in the three JSON files of github.com/LYH-YF/MWPToolkit. It is a task of
its own, `asdiv-a`, since all of its problems, those to train on too, stand in `ASDiv.xml`.

    {"@ID": "nluds-0760", "@Grade": "4", "Body": "Jane can …", "Question": "how many …?", "Answer": "16 (days)", …}
"""

from functools import partial
from typing import Any

from ptmoe.tasks.base import Example, Format, Hub, Origin, Split
from ptmoe.tasks.prompts import WordProblems, word_problem
from ptmoe.tasks.records import text_of, xml_elements


def example(record: dict[str, Any], origin: Origin) -> Example:
    sentences = text_of(record, "Body", may_be_empty=True), text_of(record, "Question")
    name, answer, formula = text_of(record, "ID"), text_of(record, "Answer"), record.get("Formula", "")
    return word_problem(origin, name, *sentences, answer=answer, equation=formula)


def json_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a record that writes the attributes of the XML with an `@`."""
    return example({key.removeprefix("@"): value for key, value in record.items()}, origin)


def hub_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a row of the Hub's copy: its keys are in lower case."""
    return example({"ID": origin.id, **{key.capitalize(): value for key, value in record.items()}}, origin)


_ROOTS = ("Machine-Reading-Corpus-File", "ProblemSet")

TASKS = (
    WordProblems(
        name="asdiv",
        splits={"test": Split(2305, ("ASDiv.xml",), hub="validation")},
        licence="CC BY-NC 4.0",
        source="github.com/chaochun/nlu-asdiv-dataset",
        formats=(Format("ASDiv's XML", "<", _ROOTS, example, partial(xml_elements, name="Problem")),),
        hub=Hub("EleutherAI/asdiv", hub_example, config="asdiv"),
        note="papers that report 301 use a split of their own: give it with --ids",
    ),
    WordProblems(
        name="asdiv-a",
        splits={
            "train": Split(974, ("train.json", "trainset.json")),
            "validation": Split(122, ("valid.json", "validset.json")),
            "test": Split(122, ("test.json", "testset.json")),
        },
        licence="CC BY-NC 4.0",
        source="github.com/LYH-YF/MWPToolkit",
        formats=(Format("ASDiv-A's JSON", "[{", ("@ID Body Question Answer",), json_example),),
        disjoint=True,
        note="the arithmetic part of asdiv, whose test holds all of it; no copy on the Hub: give a folder",
    ),
)
