"""MRQA 2019: twelve sets of questions about passages, six of them out of domain (Fisch et al., arXiv:1910.09753).

    {"header": {"dataset": "NewsQA", "split": "dev"}}
    {"context": "NEW DELHI, India (CNN) -- …", "qas": [{"qid": "f7b2f89be172…", "question": "Who …?",
     "answers": ["Harrison Ford"], "detected_answers": [{"text": "Harrison Ford", "char_spans": [[877, 889]], …}]}], …}

Gzipped JSON lines: a header, then one passage a line; `char_spans` are inclusive. `[TLE]`, `[DOC]`, `[PAR]`, `[SEP]` in
a passage are the release's own markers of titles, documents, paragraphs and the end of a title. SQuAD v1.1's JSON:

    {"version": "1.1", "data": [{"title": "…", "paragraphs": [{"context": "…", "qas": [{"id": "…", "question": "…",
     "answers": [{"text": "…", "answer_start": 177}]}]}]}]}

`test` is the released dev file, as in papers. Any of `answers` is correct; training supervises the first answer that
was detected in the passage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Format, Hub, Origin, Split, Task
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.records import Record, has, json_array, json_lines, object_of, text_of

_RELEASE = "https://s3.us-east-2.amazonaws.com/mrqa/release/v2"

# name: (its name in the release, examples and MD5 of train if it is in domain, of dev); from the README of
# github.com/mrqa.
RELEASED: dict[str, tuple[Any, ...]] = {
    "squad": ("SQuAD", 86588, "efd6a551d2697c20a694e933210489f8", 10507, "05f3f16c5c31ba8e46ff5fa80647ac46"),
    "newsqa": ("NewsQA", 74160, "182f4e977b849cb1dbfb796030b91444", 4212, "5c188c92a84ddffe2ab590ac7598bde2"),
    "triviaqa": ("TriviaQA-web", 61688, "e18f586152612a9358c22f5536bfd32a", 7785, "5c9fdc633dfe196f1b428c81205fd82f"),
    "searchqa": ("SearchQA", 117384, "612245315e6e7c4d8446e5fcc3dc1086", 16980, "9217ad3f6925c384702f2a4e6d520c38"),
    "hotpotqa": ("HotpotQA", 72928, "d212c7b3fc949bd0dc47d124e8c34907", 5904, "125a96846c830381a8acff110ff6bd84"),
    "naturalquestions": (
        "NaturalQuestionsShort",
        104071,
        "e27d27bf7c49eb5ead43cef3f41de6be",
        12836,
        "c0347eebbca02d10d1b07b9a64efe61d",
    ),
    "bioasq": ("BioASQ", 1504, "70752a39beb826a022ab21353cb66e54"),
    "drop": ("DROP", 1503, "070eb2ac92d2b2fc1b99abeda97ac37a"),
    "duorc": ("DuoRC.ParaphraseRC", 1501, "b325c0ad2fa10e699136561ee70c5ddd"),
    "race": ("RACE", 674, "ba8063647955bbb3ba63e9b17d82e815"),
    "relationextraction": ("RelationExtraction", 2948, "266be75954fcb31b9dbfa9be7a61f088"),
    "textbookqa": ("TextbookQA", 1503, "8b52d21381d841f8985839ec41a6c7f7"),
}
_SHORT = {  # the file names that the release's download script uses
    "TriviaQA-web": "TriviaQA",
    "NaturalQuestionsShort": "NaturalQuestions",
    "DuoRC.ParaphraseRC": "DuoRC",
}
# BioASQ's file needs a registration on its own site, which saves it under the same name.
_URLS = {"bioasq": "http://participants-area.bioasq.org/MRQA2019/"}


def passages(path: Path, problems: Problems) -> Iterator[Record]:
    """Each question of MRQA's lines with its context."""
    for place, line in json_lines(path, problems):
        if "header" not in line or "qas" in line:
            yield from _questions(place, line, problems)


def articles(path: Path, problems: Problems) -> Iterator[Record]:
    """Each question of SQuAD's articles with its context."""
    for place, article in json_array(path, problems, key="data"):
        title = f"article {article.get('title', '')!r}, paragraph"
        for where, paragraph in _nested(place, article, "paragraphs", title, problems):
            yield from _questions(where, paragraph, problems)


def _questions(place: str, passage: dict[str, Any], problems: Problems) -> Iterator[Record]:
    for where, question in _nested(place, passage, "qas", "question", problems):
        yield where, {"context": passage.get("context"), **question}


def _nested(place: str, record: dict[str, Any], key: str, name: str, problems: Problems) -> Iterator[Record]:
    """Each object of the list under `key`."""
    objects = record.get(key)
    if not isinstance(objects, list):
        return problems.add(place, f"lacks a list of {key!r} {has(record)}")
    for number, nested in enumerate(objects, 1):
        where = f"{place}, {name} {number}"
        with problems.at(where):
            yield where, object_of(nested)
    return None


def mrqa_example(record: dict[str, Any], origin: Origin) -> Example:
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRecordError("'answers' needs a list of one text or more")
    text, span = answers[0], None
    try:
        found = next((found for found in record.get("detected_answers") or [] if found["char_spans"]), None)
        if found is not None:
            (start, end), text = found["char_spans"][0], text_of(found, "text")
            span = (int(start), int(end) + 1)
    except (TypeError, ValueError, LookupError):
        raise BadRecordError('\'detected_answers\' needs a list of {"text": …, "char_spans": [[…, …], …]}') from None
    return _example(record, "qid", answers, text, span, origin)


def squad_example(record: dict[str, Any], origin: Origin) -> Example:
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        raise BadRecordError("'answers' needs a list of one answer or more")
    if not all(isinstance(answer, dict) and isinstance(answer.get("text"), str) for answer in answers):
        raise BadRecordError('\'answers\' needs a list of {"text": …, "answer_start": …}')
    text, start = answers[0]["text"], answers[0].get("answer_start")
    span = (start, start + len(text)) if isinstance(start, int) else None
    return _example(record, "id", [answer["text"] for answer in answers], text, span, origin)


def hub_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a row of the Hub's copy, one question with its context; lists of records may come as records of lists."""
    detected = [
        {"text": found["text"], "char_spans": [(span["start"], span["end"]) for span in _rows(found["char_spans"])]}
        for found in _rows(record["detected_answers"])
    ]
    return mrqa_example({**record, "detected_answers": detected}, origin)


def _rows(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value)


def _example(
    record: dict[str, Any], key: str, answers: list[str], target: str, span: tuple[int, int] | None, origin: Origin
) -> Example:
    name, context = text_of(record, key), text_of(record, "context")
    if not target.strip():
        raise BadRecordError("the answer is empty")
    if span is not None and not 0 <= span[0] < span[1] <= len(context):
        span = None  # still a target; only the cut depends on the span
    text, place = prompts.question(text_of(record, "question"), context)
    references = tuple(dict.fromkeys(answers))
    return Example(name, text, f" {target.strip()}", references, origin.task, context=place, answer=span)


def _split(name: str, folder: str, hub: str, examples: int, md5: str) -> Split:
    """Files as in the folders of the release, or in one folder as `NAME-train`, `NAME-dev`; a bare name is dev."""
    released = RELEASED[name][0]
    names = dict.fromkeys((released, _SHORT.get(released, released)))
    forms = (f"{folder}/{{}}", f"{{}}-{folder}", *(("{}",) if folder == "dev" else ()))
    files = [form.format(file) + end for form in forms for file in names for end in (".jsonl.gz", ".jsonl")]
    if name == "squad":
        files.append(f"{folder}-v1.1.json")
    return Split(examples, tuple(files), hub, _URLS.get(name, f"{_RELEASE}/{folder}/{released}.jsonl.gz"), md5)


def _task(name: str, released: str, *sizes_and_sums: Any) -> Task:
    *train, examples, md5 = sizes_and_sums
    splits = {"train": _split(name, "train", "train", *train)} if train else {}
    return Task(
        name=f"mrqa/{name}",
        splits={**splits, "test": _split(name, "dev", "validation" if train else "test", examples, md5)},
        grader="qa",
        metric="f1",
        max_new_tokens=32,
        until=("\n",),
        licence="CC BY-SA 4.0" if name == "squad" else "its own",
        source="github.com/mrqa/MRQA-Shared-Task-2019",
        formats=(
            Format("MRQA's JSON lines", "{", ("context qas", "header"), mrqa_example, passages),
            Format("SQuAD v1.1's JSON", "{", ("data",), squad_example, articles),
        ),
        hub=Hub(
            "mrqa-workshop/mrqa",
            hub_example,
            where=("subset", released),
            columns=("context", "qid", "question", "answers", "detected_answers"),
        ),
        note="test is the released dev file",
    )


TASKS = tuple(_task(name, *released) for name, released in RELEASED.items())
GROUPS = {
    "mrqa-in": tuple(task.name for task in TASKS if "train" in task.splits),
    "mrqa-out": tuple(task.name for task in TASKS if "train" not in task.splits),
}
