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

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptmoe.tasks import prompts
from ptmoe.tasks.base import Example, Hub, Origin, Split, Task
from ptmoe.tasks.records import BadRecordError, Format, Problems, Record, json_array, json_lines, text_of

_RELEASE = "https://s3.us-east-2.amazonaws.com/mrqa/release/v2"
_CC_BY_SA = "CC BY-SA 4.0"
_UNSTATED = "its own"

# name: (its name in the release, examples and MD5 of train, of dev); from the README of github.com/mrqa.
IN_DOMAIN = {
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
}
OUT_OF_DOMAIN = {
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


def passages(path: Path, problems: Problems) -> Iterator[Record]:
    """Each question of MRQA's lines with its context."""
    for place, line in json_lines(path, problems):
        if "header" not in line or "qas" in line:
            yield from _questions(place, line, problems)


def articles(path: Path, problems: Problems) -> Iterator[Record]:
    """Each question of SQuAD's articles with its context."""
    for place, article in json_array(path, problems, key="data"):
        paragraphs = article.get("paragraphs")
        if not isinstance(paragraphs, list):
            problems.add(place, f"the article lacks a list of 'paragraphs' (has {', '.join(map(repr, article))})")
            continue
        for number, paragraph in enumerate(paragraphs, 1):
            where = f"{place} (article {article.get('title', '')!r}, paragraph {number})"
            if isinstance(paragraph, dict):
                yield from _questions(where, paragraph, problems)
            else:
                problems.add(where, f"a JSON {type(paragraph).__name__}, needs an object")


def _questions(place: str, passage: dict[str, Any], problems: Problems) -> Iterator[Record]:
    questions = passage.get("qas")
    if not isinstance(questions, list):
        return problems.add(place, f"lacks a list of 'qas' (has {', '.join(map(repr, passage))})")
    for number, question in enumerate(questions, 1):
        where = f"{place}, question {number}" if len(questions) > 1 else place
        if isinstance(question, dict):
            yield where, {"context": passage.get("context"), **question}
        else:
            problems.add(where, f"a JSON {type(question).__name__}, needs an object")
    return None


def mrqa_example(record: dict[str, Any], origin: Origin) -> Example:
    spans = [
        (found["text"], found["char_spans"][0])
        for found in record.get("detected_answers") or []
        if isinstance(found, dict) and isinstance(found.get("text"), str) and found.get("char_spans")
    ]
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRecordError("'answers' needs a list of one text or more")
    if not spans:
        return _example(record, text_of(record, "qid"), answers, answers[0], None, origin)
    text, (start, end) = spans[0]
    return _example(record, text_of(record, "qid"), answers, text, (start, end + 1), origin)


def squad_example(record: dict[str, Any], origin: Origin) -> Example:
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        raise BadRecordError("'answers' needs a list of one answer or more")
    for answer in answers:
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise BadRecordError('\'answers\' needs a list of {"text": …, "answer_start": …}')
    text, start = answers[0]["text"], answers[0].get("answer_start")
    span = (start, start + len(text)) if isinstance(start, int) else None
    return _example(record, text_of(record, "id"), [answer["text"] for answer in answers], text, span, origin)


def hub_example(record: dict[str, Any], origin: Origin) -> Example:
    """From a row of the Hub's copy, one question with its context; lists of records may come as records of lists."""
    spans = []
    for found in _rows(record["detected_answers"]):
        where = _rows(found["char_spans"])
        if where:
            spans.append({"text": found["text"], "char_spans": [[where[0]["start"], where[0]["end"]]]})
    return mrqa_example({**record, "detected_answers": spans}, origin)


def _rows(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return list(value)


def _example(
    record: dict[str, Any],
    name: str,
    answers: list[str],
    target: str,
    span: tuple[int, int] | None,
    origin: Origin,
) -> Example:
    context = text_of(record, "context")
    if span is not None and not 0 <= span[0] < span[1] <= len(context):
        span = None  # still a target; only the cut depends on the span
    text, place = prompts.question(text_of(record, "question"), context)
    return Example(
        id=name,
        input=text,
        target=f" {target.strip()}",
        references=tuple(dict.fromkeys(answers)),
        task=origin.task,
        context=place,
        answer=span,
    )


_LINES = Format(
    "MRQA's JSON lines", "{", lambda keys: keys >= {"context", "qas"} or "header" in keys, passages, mrqa_example
)
_SQUAD = Format(
    "SQuAD v1.1's JSON", "{", lambda keys: "data" in keys and "prediction" not in keys, articles, squad_example
)


def _files(folder: str, released: str) -> tuple[str, ...]:
    """As in the folders of the release, or in one folder as `NAME-train`, `NAME-dev`; a bare name is the dev file."""
    names = (released, _SHORT[released]) if released in _SHORT else (released,)
    forms = (f"{folder}/{{}}", f"{{}}-{folder}", *(("{}",) if folder == "dev" else ()))
    return tuple(form.format(name) + ending for form in forms for name in names for ending in (".jsonl.gz", ".jsonl"))


def _task(name: str, released: str, splits: dict[str, Split], licence: str = _UNSTATED) -> Task:
    return Task(
        name=f"mrqa/{name}",
        splits=splits,
        grader="qa",
        metric="f1",
        max_new_tokens=32,
        until=("\n",),
        licence=licence,
        source="github.com/mrqa/MRQA-Shared-Task-2019",
        formats=(_LINES, _SQUAD),
        hub=Hub(
            "mrqa-workshop/mrqa",
            hub_example,
            where=("subset", released),
            columns=("context", "qid", "question", "answers", "detected_answers"),
        ),
        note="test is the released dev file",
    )


def _in_domain(name: str) -> Task:
    released, train, train_md5, dev, dev_md5 = IN_DOMAIN[name]
    train_files, dev_files = _files("train", released), _files("dev", released)
    if name == "squad":
        train_files, dev_files = (*train_files, "train-v1.1.json"), (*dev_files, "dev-v1.1.json")
    url = f"{_RELEASE}/{{}}/{released}.jsonl.gz"
    splits = {
        "train": Split(train, train_files, "train", url.format("train"), train_md5),
        "test": Split(dev, dev_files, "validation", url.format("dev"), dev_md5),
    }
    return _task(name, released, splits, _CC_BY_SA if name == "squad" else _UNSTATED)


def _out_of_domain(name: str) -> Task:
    released, examples, md5 = OUT_OF_DOMAIN[name]
    # BioASQ's file needs a registration on its own site, which saves it under the same name.
    url = f"{_RELEASE}/dev/{released}.jsonl.gz" if name != "bioasq" else "http://participants-area.bioasq.org/MRQA2019/"
    return _task(name, released, {"test": Split(examples, _files("dev", released), "test", url, md5)})


TASKS = (*(_in_domain(name) for name in IN_DOMAIN), *(_out_of_domain(name) for name in OUT_OF_DOMAIN))
GROUPS = {
    "mrqa-in": tuple(f"mrqa/{name}" for name in IN_DOMAIN),
    "mrqa-out": tuple(f"mrqa/{name}" for name in OUT_OF_DOMAIN),
}
