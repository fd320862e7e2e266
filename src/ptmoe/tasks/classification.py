"""Classification: GLUE, SuperGLUE, AG News and TREC, each answered by a word, without an instruction.

    sentence	label                                                     GLUE's TSV (CoLA's has no header)
    it 's a charming and often affecting journey . 	1
    {"question": "…", "passage": "…", "idx": 0, "label": true}        SuperGLUE's JSON lines
    "3","Wall St. Bears Claw Back","Short-sellers, …"                 AG News's CSV, with or without a header
    DESC:manner How did serfdom develop in and then leave Russia ?    TREC's lines, in Latin-1; elsewhere: 0 How did …
    [{"sentence": "Text: in its own way .", "label": "Good"}]         a list of texts as they are to be read, of any set

Sources: gluebenchmark.com (Wang et al., arXiv:1804.07461), super.gluebenchmark.com (arXiv:1905.00537), AG News
(Zhang et al., arXiv:1509.01626), TREC (Li and Roth, COLING 2002; its coarse classes). The lists are those of
github.com/cmnfriend/O-LoRA, the numbered lines those of github.com/harvardnlp/sent-conv-torch.

A record becomes its fields, a line each, then `=>`; the completion is a space and a word (`Task.labels`). A set has the
same prompt from whatever source it is read: O-LoRA's, where that has one. The longest line may be cut from its end.

The labels of GLUE's and SuperGLUE's test splits are not public, so `test` is the released validation split, as in
papers. In every set a tenth of the released training split is `validation` (`ptmoe.tasks.base.is_held_out`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from string import Formatter
from typing import Any

from ptmoe.tasks.base import Example, Format, Hub, Origin, Split, Task
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.records import csv_rows, has, text_lines, text_of

Labels = Mapping[str, str]
"""By the word that answers, in the order of the published numbers, the names of the label, separated by commas."""

NO_YES = {"no": "false", "yes": "true"}
ENTAILED = {"yes": "entailment", "no": "not_entailment,contradiction"}
TOPICS = {"world": "", "sports": "", "business": "", "science": "sci/tech,science or technology"}
QUESTIONS = {
    "abbreviation": "abbr",
    "entity": "enty",
    "description": "desc",
    "human": "hum",
    "location": "loc",
    "number": "num",
}
NUMBERED = ("description", "entity", "abbreviation", "human", "location", "number")  # in the numbered lines of TREC
PAIR = "sentence 1: {sentence1}\nsentence 2: {sentence2}"
PREMISE = "premise: {premise}\nhypothesis: {hypothesis}"
AG_COLUMNS = ("Class Index", "Title", "Description")


def example(
    record: dict[str, Any], origin: Origin, *, template: str, labels: Labels, columns: Mapping[str, str], numbers: bool
) -> Example:
    """
    Args:
        template: with the record's fields.
        labels: of the set.
        columns: other names of fields in the record.
        numbers: whether labels may be numbers, from 0.
    """
    fields = [name for _, name, _, _ in Formatter().parse(template) if name]
    texts = {field: text_of(record, columns.get(field, field)).strip() for field in fields}
    column = columns.get("label", "label")
    if column not in record:
        raise BadRecordError(f"lacks the key {column!r} {has(record)}")
    return _labelled(template.format(**texts), record[column], labels, origin, numbers=numbers)


def _labelled(text: str, label: Any, labels: Labels, origin: Origin, *, numbers: bool) -> Example:
    words = {
        name.casefold(): word
        for number, (word, names) in enumerate(labels.items())
        for name in (word, *names.split(","), *([str(number)] if numbers else []))
        if name
    }
    word = words.get(str(label).strip().casefold())
    if word is None:
        raise BadRecordError(f"the label {label!r} is no choice of {origin.task}: needs one of {', '.join(words)}")
    longest = max(text.split("\n"), key=len)
    start = text.index(longest)
    context = (start, start + len(longest))
    return Example(origin.id, f"{text}\n=>", f" {word}", (word,), origin.task, context=context)


def ag_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a row of the CSV, whose classes count from 1."""
    number, *texts = (text_of(record, column).strip() for column in AG_COLUMNS)
    label = str(int(number) - 1) if number.isdecimal() else number
    try:
        return _labelled("Title: {}\nText: {}".format(*texts), label, TOPICS, origin, numbers=True)
    except BadRecordError:
        raise BadRecordError(f"the label {number!r} is no choice of agnews: needs one of 1, 2, 3, 4") from None


def trec_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a line: a class and its finer class, or a number, then the question."""
    label, _, question = record["line"].partition(" ")
    if not question.strip():
        raise BadRecordError(f"{record['line']!r:.60} is no question after a label and a space")
    if label.isdecimal() and int(label) < len(NUMBERED):
        label = NUMBERED[int(label)]
    return _labelled(question.strip(), label.partition(":")[0], QUESTIONS, origin, numbers=False)


def _task(
    name: str,
    sizes: tuple[int, int],
    labels: Labels,
    *,
    files: Sequence[str],
    hub: Hub,
    test: str,
    formats: tuple[Format, ...],
    **about: Any,
) -> Task:
    """A set, with the published sizes of `train` and `test`; `files` are names of the two in turns. Lists are called
    `train.json` and `test.json`."""
    train, tested = ((*files[place::2], f"{split}.json") for place, split in enumerate(("train", "test")))
    listed = partial(example, template="{sentence}", labels=labels, columns={}, numbers=False)
    lists = Format("a list of sentences and labels", "[{", ("sentence label",), listed)
    return Task(
        name=name,
        splits={
            "train": Split(sizes[0], train, "train", held_out=False),
            "validation": Split(None, train, "train", held_out=True),
            "test": Split(sizes[1], tested, test),
        },
        grader="verbatim",
        metric="accuracy",
        max_new_tokens=16,
        formats=(*formats, lists),
        hub=hub,
        until=("\n",),
        chat=False,
        labels=tuple(labels),
        **about,
    )


def _glue(
    name: str,
    folder: str,
    sizes: tuple[int, int],
    template: str,
    labels: Labels,
    *,
    columns: Mapping[str, str] | None = None,
    header: str = "",
    matched: str = "",
    note: str = "test is the released validation split",
) -> Task:
    """A set of GLUE. `template` has the Hub's names of the fields, `columns` the TSV's where they differ."""
    make = partial(example, template=template, labels=labels, numbers=True)
    columns = columns or {}
    fields = {columns.get(field, field) for _, field, _, _ in Formatter().parse(template + "{label}") if field}
    keys = () if header else (" ".join(field for field in fields if " " not in field),)
    return _task(
        f"glue/{name}",
        sizes,
        labels,
        files=[f"{place}{stem}.tsv" for place in (f"{folder}/", "") for stem in ("train", f"dev{matched}")],
        hub=Hub("nyu-mll/glue", partial(make, columns={}), config=name),
        test=f"validation{matched}",
        formats=(
            Format(
                f"{folder}'s TSV",
                "\t",
                keys,
                partial(make, columns=columns),
                partial(csv_rows, columns=header.split(), tabs=True),
            ),
        ),
        licence="its own",
        source="gluebenchmark.com",
        note=note,
    )


def _superglue(name: str, folder: str, sizes: tuple[int, int], template: str, labels: Labels) -> Task:
    make = partial(example, template=template, labels=labels, columns={}, numbers=True)
    fields = " ".join(field for _, field, _, _ in Formatter().parse(template + "{label}") if field)
    return _task(
        f"superglue/{name}",
        sizes,
        labels,
        files=[f"{place}{stem}.jsonl" for place in (f"{folder}/", "") for stem in ("train", "val")],
        hub=Hub("aps/super_glue", make, config=name),
        test="validation",
        formats=(Format(f"{folder}'s JSON lines", "{", (fields,), make),),
        licence="its own",
        source="super.gluebenchmark.com",
        note="test is the released validation split",
    )


TASKS = (
    _glue(
        "cola",
        "CoLA",
        (8551, 1043),
        "{sentence}",
        {"unacceptable": "", "acceptable": ""},
        header="source label star sentence",
    ),
    _glue("sst2", "SST-2", (67349, 872), "Text: {sentence}", {"negative": "bad", "positive": "good"}),
    _glue(
        "mrpc",
        "MRPC",
        (3668, 408),
        PAIR,
        NO_YES,
        columns={"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"},
    ),
    _glue(
        "qqp",
        "QQP",
        (363846, 40430),
        "question 1: {question1}\nquestion 2: {question2}",
        NO_YES,
        columns={"label": "is_duplicate"},
        note="test is the released validation split; the released train.tsv has broken rows: --skip-bad",
    ),
    _glue(
        "mnli",
        "MNLI",
        (392702, 9815),
        PREMISE,
        {"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
        columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
        matched="_matched",
        note="test is the released validation split, matched; for the other give its file with --data-dir",
    ),
    _glue("qnli", "QNLI", (104743, 5463), "question: {question}\nsentence: {sentence}", ENTAILED),
    _glue("rte", "RTE", (2490, 277), PAIR, ENTAILED),
    _glue("wnli", "WNLI", (635, 71), PAIR, {"no": "not_entailment", "yes": "entailment"}),
    _superglue("boolq", "BoolQ", (9427, 3270), "question: {question}\npassage: {passage}", NO_YES),
    _superglue("cb", "CB", (250, 56), PREMISE, {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}),
    _superglue(
        "copa",
        "COPA",
        (400, 100),
        "premise: {premise}\nquestion: {question}\nchoice 1: {choice1}\nchoice 2: {choice2}",
        {"first": "", "second": ""},
    ),
    _superglue("rte", "RTE", (2490, 277), "sentence 1: {premise}\nsentence 2: {hypothesis}", ENTAILED),
    _superglue("wic", "WiC", (5428, 638), "word: {word}\n{sentence1}\n{sentence2}", NO_YES),
    _task(
        "agnews",
        (120_000, 7600),
        TOPICS,
        files=("ag_news_csv/train.csv", "ag_news_csv/test.csv", "train.csv", "test.csv"),
        hub=Hub(
            "fancyzhx/ag_news",
            partial(example, template="Text: {text}", labels=TOPICS, columns={}, numbers=True),
        ),
        test="test",
        formats=(Format("AG News's CSV", ",\t", (), ag_example, partial(csv_rows, columns=AG_COLUMNS)),),
        licence="its own",
        source="groups.di.unipi.it/~gulli/AG_corpus_of_news_articles.html",
        note="the Hub's copy has title and text in one",
    ),
    _task(
        "trec",
        (5452, 500),
        QUESTIONS,
        files=("train_5500.label", "TREC_10.label", "TREC.train.all", "TREC.test.all"),
        hub=Hub(
            "CogComp/trec",
            partial(example, template="{text}", labels=QUESTIONS, columns={"label": "coarse_label"}, numbers=True),
        ),
        test="test",
        formats=(Format("TREC's lines", ",\t", (), trec_example, partial(text_lines, encoding="latin-1")),),
        licence="its own",
        source="cogcomp.seas.upenn.edu/Data/QA/QC",
    ),
    Task(
        name="mixture/classification",
        splits={"train": Split(None), "validation": Split(None), "test": Split(None)},
        grader="verbatim",
        metric="accuracy",
        max_new_tokens=16,
        licence="theirs",
        source="its parts",
        until=("\n",),
        chat=False,
        parts=("agnews", "superglue/boolq", "superglue/rte", "glue/sst2", "trec", "superglue/wic"),
        note="its parts alternate, each a domain",
    ),
)
