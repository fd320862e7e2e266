"""The seventeen data sets: each original format and its damage, mixtures, downloads, the Hub, streaming, scores."""

import contextlib
import gzip
import hashlib
import http.server
import json
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import ptmoe
from ptmoe.tasks import GROUPS, TASKS, Problems, load_task, sources, stream_task, task_names
from ptmoe.tasks.base import Split
from ptmoe.tasks.predictions import read_predictions
from ptmoe.tasks.problems import SHOWN

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="needs the data sets' own files")
MRQA = [name for name in TASKS if name.startswith("mrqa/")]
REAL = [
    ("gsm8k", "train", SHARED, 7473),
    ("gsm8k", "test", SHARED, 1319),
    ("svamp", "test", SHARED, 1000),
    ("mrqa/squad", "test", SHARED / "squad" / "xquad.en.json", 1190),
]


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PTMOE_DATA_DIR", raising=False)


def lines(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


# ---- small files in each original format, two examples each ----------------------------------------------------------

GSM8K = [
    {"question": "Ann has 2 cups and buys 3. How many?", "answer": "She has 2 + 3 = <<2+3=5>>5 cups.\n#### 5"},
    {"question": "What are 1,000 and 234?", "answer": "1,000 + 234 = <<1000+234=1234>>1,234\n#### 1,234"},
]
SVAMP = [
    {
        "ID": "chal-1",
        "Body": "A pack costs 76 dollars",
        "Question": "How much is it at 25 off?",
        "Answer": 51.0,
        "Type": "Subtraction",
    },
    {
        "ID": "chal-2",
        "Body": "There are 9 cups.",
        "Question": "How many for each of 3?",
        "Equation": "( 7.5 / 3.0 )",
        "Answer": 2.5,
        "Type": "Common-Divison",
    },
]
ASDIV = """<?xml version="1.0" encoding="UTF-8" ?>
<Machine-Reading-Corpus-File>
<ProblemSet>
\t<Problem ID="nluds-0001" Grade="1" Source="http://www.k5learning.com">
\t\t<Body>Seven red apples and two green apples are in the basket.</Body>
\t\t<Question>How many apples are in the basket? </Question>
\t\t<Solution-Type Subgoal-1="Sum">Addition</Solution-Type>
\t\t<Answer>9 (apples)</Answer>
\t\t<Formula>7+2=9</Formula>
\t</Problem>
\t<Problem ID="nluds-0030" Grade="1" Source="http://www.k5learning.com">
\t\t<Body>Mrs. Hilt has 3 &gt; 2 pens,</Body>
\t\t<Question>who has more?</Question>
\t\t<Solution-Type>Comparison</Solution-Type>
\t\t<Answer>Mrs. Hilt</Answer>
\t\t<Formula>3&gt;2</Formula>
\t</Problem>
</ProblemSet>
</Machine-Reading-Corpus-File>
"""
MAWPS_CSV = """Question,Numbers,Equation,Answer,group_nums,Body,Ques_Statement
"If Bryan has number0 books in each of his number1 shelves , how many ?",56.0 9.0,* number0 number1,504.0,"[12, 13]",x,y
How much is number0 ?,0.16666666666666666,+ number0 number0,5.25,"[1]",x,y
"""
MAWPS_JSON = [
    {
        "iIndex": 1,
        "sQuestion": "Joan found 70.0 shells, gave 27.0. How many?",
        "lEquations": ["X=(70.0-27.0)"],
        "lSolutions": [43.0],
    },
    {"iIndex": 2, "sQuestion": "Two numbers?", "lEquations": ["x=1"], "lSolutions": ["1", 2.5]},
]
MWP_JSON = [
    {"id": 2351, "original_text": "A waiter had 22 customers .", "equation": "X=(22.0-20.0)", "ans": 2.0},
    {"id": 2352, "original_text": "And 3 more ?", "equation": "X=1", "ans": 3.5},
]
MATHQA = [
    {"Problem": "each of 4 ?", "options": "a ) 24 , b ) 1,200 , c ) 625 , d ) 720 , e ) none of these", "correct": "b"},
    {
        "Problem": "and this ?",
        "options": "['a ) 3 / 8', 'b ) 27.675', 'c ) rs . 30', 'd ) x', 'e ) y']",
        "correct": "c",
    },
]
MRQA_LINES = [
    {"header": {"dataset": "NewsQA", "split": "dev"}},
    {
        "context": "[TLE] Delhi [PAR] It is big.",
        "qas": [
            {
                "qid": "q1",
                "question": "Where?",
                "answers": ["Delhi", "New Delhi"],
                "detected_answers": [{"text": "Delhi", "char_spans": [[6, 10]], "token_spans": [[1, 1]]}],
            },
            {"qid": "q2", "question": "How?", "answers": ["huge"], "detected_answers": []},
        ],
    },
]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Delhi",
            "paragraphs": [
                {
                    "context": "Delhi is big.",
                    "qas": [
                        {"id": "s1", "question": "Where?", "answers": [{"text": "Delhi", "answer_start": 0}]},
                        {"id": "s2", "question": "How?", "answers": [{"text": "big", "answer_start": 9}] * 2},
                    ],
                }
            ],
        }
    ],
}


def files(folder):
    """Each format's file: its task, its path, what its examples' references are."""
    made = {
        "gsm8k": ("gsm8k", lines(folder / "gsm8k.jsonl", *GSM8K), ["5", "1,234"]),
        "svamp": ("svamp", folder / "svamp.json", ["51", "2.5"]),
        "asdiv": ("asdiv", folder / "asdiv.xml", ["9 (apples)", "Mrs. Hilt"]),
        "mawps csv": ("mawps", folder / "mawps.csv", ["504", "5.25"]),
        "mawps json": ("mawps", folder / "mawps.json", ["43", "1; 2.5"]),
        "mwptoolkit": ("mawps", folder / "mwp.json", ["2", "3.5"]),
        "mathqa": ("math_problems", folder / "mathqa.json", ["1,200", "rs . 30"]),
        "boxed": (
            "math_problems",
            lines(
                folder / "boxed.jsonl",
                *({"problem": "p", "solution": f"so \\boxed{{{n}}}."} for n in (r"\frac{1}{2}", 7)),
            ),
            [r"\frac{1}{2}", "7"],
        ),
        "mrqa": ("mrqa/newsqa", lines(folder / "mrqa.jsonl", *MRQA_LINES), ["Delhi", "huge"]),
        "mrqa gzip": ("mrqa/drop", folder / "mrqa.jsonl.gz", ["Delhi", "huge"]),
        "squad": ("mrqa/squad", folder / "squad.json", ["Delhi", "big"]),
    }
    made["svamp"][1].write_text(json.dumps(SVAMP, indent=4))
    made["asdiv"][1].write_text(ASDIV)
    made["mawps csv"][1].write_text(MAWPS_CSV)
    made["mawps json"][1].write_text(json.dumps(MAWPS_JSON))
    made["mwptoolkit"][1].write_text(json.dumps(MWP_JSON, indent=1))
    made["mathqa"][1].write_text(json.dumps(MATHQA))
    made["mrqa gzip"][1].write_bytes(gzip.compress(made["mrqa"][1].read_bytes()))
    made["squad"][1].write_text(json.dumps(SQUAD))
    return made


FORMATS = "gsm8k,svamp,asdiv,mawps csv,mawps json,mwptoolkit,mathqa,boxed,mrqa,mrqa gzip,squad".split(",")


@pytest.mark.parametrize("name", FORMATS)
def test_each_original_format_is_read(name, tmp_path):
    task, path, references = files(tmp_path)[name]
    examples = load_task(task, "test", path)
    assert [example.references[0] for example in examples] == references
    assert all(example.task == task for example in examples)
    assert list(stream_task(task, "test", path)) == examples
    gold = ptmoe.score(task, references, examples)
    assert set(gold.values()) == {100.0}
    wrong = ptmoe.score(task, ["#### 987654321"] * 2, examples)
    assert set(wrong.values()) == {0.0}


def test_the_examples_hold_what_their_records_say(tmp_path):
    made = {name: load_task(task, "test", path) for name, (task, path, _) in files(tmp_path).items()}
    assert made["gsm8k"][0].input == "Question: Ann has 2 cups and buys 3. How many?\nAnswer:"
    assert made["gsm8k"][0].target == " She has 2 + 3 = <<2+3=5>>5 cups.\n#### 5"
    assert made["svamp"][0].input == "Question: A pack costs 76 dollars. How much is it at 25 off?\nAnswer:"
    assert [example.domain for example in made["svamp"]] == ["subtraction", "division"]
    assert [example.id for example in made["svamp"]] == ["chal-1", "chal-2"]
    assert made["asdiv"][1].input == "Question: Mrs. Hilt has 3 > 2 pens, who has more?\nAnswer:"
    assert made["asdiv"][1].id == "nluds-0030"
    assert "56 books in each of his 9 shelves" in made["mawps csv"][0].input
    assert "How much is 0.16666666666666666 ?" in made["mawps csv"][1].input
    assert made["mwptoolkit"][0].id == "2351"
    worked = {
        "svamp": [" #### 51", " 7.5 / 3 = 2.5\n#### 2.5"],
        "asdiv": [" 7 + 2 = 9 (apples)\n#### 9 (apples)", " #### Mrs. Hilt"],
        "mawps csv": [" 56 * 9 = 504\n#### 504", " #### 5.25"],
        "mawps json": [" 70 - 27 = 43\n#### 43", " #### 1; 2.5"],
        "mwptoolkit": [" 22 - 20 = 2\n#### 2", " #### 3.5"],
    }
    assert {name: [example.target for example in made[name]] for name in worked} == worked
    assert made["mathqa"][0].input == "Question: each of 4 ?\nAnswer:"
    first, second = made["mrqa"]
    assert first.input == "[TLE] Delhi [PAR] It is big.\n\nQuestion: Where?\nAnswer:"
    assert (first.id, first.target, first.references) == ("q1", " Delhi", ("Delhi", "New Delhi"))
    assert first.input[slice(*first.answer)] == "Delhi"
    assert second.answer is None
    assert made["squad"][1].references == ("big",)
    assert made["squad"][1].input[slice(*made["squad"][1].answer)] == "big"


@pytest.mark.parametrize("listed", ["{}", "['{}']"])
@pytest.mark.parametrize(
    "last", ["3 !", "( 1 / 2 )", "2 ( x + 1 )", "| x |", "12.5 %", "8 $", "16 , 20", "none of these"]
)
def test_an_option_of_mathqa_is_read_to_its_last_sign(last, listed, tmp_path):
    values = [last, "24", last]
    between = "', '" if "'" in listed else " , "
    options = listed.format(between.join(f"{letter} ) {value}" for letter, value in zip("abc", values, strict=True)))
    records = ({"Problem": f"{letter} ?", "options": options, "correct": letter} for letter in "abc")
    found = load_task("math_problems", "test", lines(tmp_path / "p.jsonl", *records))
    assert [example.references[0] for example in found] == values


def test_the_first_500_of_math_problems_are_its_test(tmp_path):
    path = lines(tmp_path / "p.jsonl", *({"question": f"{n}?", "answer": f"{n}"} for n in range(900)))
    assert [example.references[0] for example in load_task("math_problems", "test", path)] == [
        str(n) for n in range(500)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_in_another_familys_format_is_named_as_such(name, tmp_path):
    made = files(tmp_path)
    task, path, _ = made[name]
    own = {known.name for known in TASKS[task].formats}
    for other in ("gsm8k", "svamp", "asdiv", "mawps", "mrqa/drop"):
        if other == task or TASKS[other].formats == TASKS[task].formats:
            continue
        with pytest.raises(ptmoe.PtmoeError) as error:
            load_task(other, "test", path)
        assert "looks like" in str(error.value)
        assert any(known in str(error.value) for known in own) or "give it to --task" in str(error.value)


@needs_data
@pytest.mark.parametrize(("task", "split", "place", "count"), REAL)
@pytest.mark.ci
def test_the_real_files_load_completely_and_their_gold_answers_score_100(task, split, place, count):
    examples = load_task(task, split, place)
    assert len(examples) == count
    gold = ptmoe.score(task, {example.id: example.references[0] for example in examples}, examples)
    assert set(gold.values()) == {100.0}
    as_trained = ptmoe.score(task, [example.target for example in examples], examples)
    assert set(as_trained.values()) == {100.0}
    wrong = ptmoe.score(task, ["#### 987654321"] * len(examples), examples)
    assert set(wrong.values()) == {0.0}


@needs_data
def test_svamps_types_are_counted():
    assert Counter(example.domain for example in load_task("svamp", "test", SHARED)) == {
        "subtraction": 531,
        "addition": 195,
        "division": 166,
        "multiplication": 108,
    }


# ---- bad input -------------------------------------------------------------------------------------------------------

DAMAGE = {
    "gsm8k": ('{"question": "a", "answer": "no mark"}', r":2: the answer 'no mark' does not end with '#### n'"),
    "gsm8k key": ('{"question": "a"}', r":2: lacks the key 'answer' \(has 'question'\)"),
    "gsm8k json": ('{"question": "a", "answer', r":2: not JSON \(Unterminated string"),
    "gsm8k list": ("[1]", ":2: a JSON list, needs an object"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_json_line_is_named_or_skipped_and_counted(name, tmp_path):
    damage, message = DAMAGE[name]
    path = lines(tmp_path / "test.jsonl", GSM8K[0], damage, GSM8K[1])
    with pytest.raises(ptmoe.PtmoeError, match=rf"1 bad record\(s\):\n  .*test\.jsonl{message}"):
        load_task("gsm8k", "test", path)
    with pytest.raises(ptmoe.PtmoeError, match="1 bad record"):
        list(stream_task("gsm8k", "test", path))
    problems = Problems(skip=True)
    assert [example.references for example in load_task("gsm8k", "test", path, problems=problems)] == [
        ("5",),
        ("1,234",),
    ]
    assert problems.count == 1
    assert "test.jsonl:2" in problems.listed()


def test_damage_in_every_other_format_is_named_by_file_and_line(tmp_path):
    made = files(tmp_path)

    def refused(name, change, message, kept):
        task, path, _ = made[name]
        whole = path.read_bytes()
        path.write_bytes(change(whole))
        with pytest.raises(ptmoe.PtmoeError) as error:
            load_task(task, "test", path)
        assert message.format(path=path) in str(error.value)
        problems = Problems(skip=True)
        if kept:
            assert len(load_task(task, "test", path, problems=problems)) == kept
        else:
            with pytest.raises(ptmoe.PtmoeError, match="holds no example"):
                load_task(task, "test", path, problems=problems)
        assert problems.count >= 1
        path.write_bytes(whole)

    def without(old, new=b""):
        def change(whole):
            assert old in whole
            return whole.replace(old, new, 1)

        return change

    refused("svamp", without(b'"Type": "Common-Divison"', b'"Type": "Root"'), "{path}:9: unknown Type 'Root'", 1)
    refused("svamp", without(b'"Answer": 2.5', b'"Answer": [2]'), "{path}:9: 'Answer' is list, needs text", 1)
    refused("svamp", lambda whole: whole[:-60], "{path}:1", 1)
    refused("svamp", without(b'"ID": "chal-2"', b'"ID" "chal-2"'), "{path}:10: not JSON (Expecting ':' delimiter)", 1)
    refused("svamp", without(b"},", b"}"), "{path}:9: not JSON (no comma between two records)", 1)
    refused("svamp", without(b"cups", b"\xff"), "not UTF-8 text", 0)
    refused("asdiv", without(b"<Answer>9 (apples)</Answer>"), "{path}:4: lacks the key 'Answer'", 1)
    refused("asdiv", without(b"</Body>"), "{path}:10: not XML (mismatched tag)", 0)
    answer = b"<Answer>9 (apples)</Answer>"
    refused("asdiv", without(answer, answer + b"<Answer>8</Answer>"), "{path}:4: has the key 'Answer' twice", 1)
    refused("asdiv", without(answer, answer + b"<ID>1</ID>"), "{path}:4: has the key 'ID' twice", 1)
    refused("asdiv", lambda whole: whole[:600], "{path}:14: not XML (unclosed token)", 1)
    refused("mawps csv", without(b"56.0 9.0", b"56.0"), "{path}:2: number1 has no number: Numbers holds 1", 1)
    refused("mawps csv", without(b'"[1]",x,y', b'"[1]",x'), "{path}:3: 6 fields, the header has 7", 1)
    refused("mawps csv", without(b"Answer,group_nums", b"Answer,Answer"), "{path}:1: the header has 'Answer' twice", 0)
    refused("mawps csv", without(b'"[1]",x', b'"[1"x",x'), "{path}:3: not CSV", 1)
    opened = without(b'13]",x', b'13]","x')  # a quotation that takes in the next row
    refused("mawps csv", opened, "{path}:2: not CSV (',' expected after '\"'): all from here to line 3 is lost", 0)
    refused("mawps json", without(b'"lSolutions": [43.0]', b'"lSolutions": []'), "{path}:1: 'lSolutions' needs", 1)
    refused("mathqa", without(b'"correct": "b"', b'"correct": "z"'), "{path}:1: the correct option 'z' is not among", 1)
    refused("boxed", without(b"boxed{7}", b"box{7}"), "{path}:2: the solution has no \\boxed", 1)
    refused(
        "mrqa", without(b'"answers": ["huge"]', b'"answers": []'), "{path}:2, question 2: 'answers' needs a list", 1
    )
    refused("mrqa", without(b'"qas"', b'"questions"'), "{path}:2: lacks a list of 'qas'", 0)
    refused("mrqa gzip", lambda whole: whole[:-20], "{path}:2: damaged gzip", 0)
    refused("mrqa gzip", lambda whole: whole[:60] + b"\x00" * 20 + whole[80:], "damaged gzip", 0)
    refused("squad", without(b'"paragraphs"', b'"texts"'), "{path}:1: lacks a list of 'paragraphs'", 0)
    refused("squad", without(b'"id": "s2"', b'"name": "s2"'), "paragraph 1, question 2: lacks the key 'id'", 1)


ODD = (None, True, 5, 0.5, float("nan"), "", " ", "zz", [], [5], [[]], [["zz", 1]], {}, {"text": 5})


def with_odd_values(value):
    """The value with each value in it, at any depth, replaced by each odd one, or taken out."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for changed in (*ODD, *with_odd_values(inner)):
                yield type(value)(value | {key: changed} if isinstance(value, dict) else [*value[:key], changed])
            yield {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[:key]


@pytest.mark.parametrize(
    ("task", "records"),
    {
        "gsm8k": GSM8K,
        "svamp": SVAMP,
        "mawps": MAWPS_JSON,
        "math_problems": MATHQA,
        "mrqa/newsqa": MRQA_LINES,
        "mrqa/squad": [SQUAD],
        "superglue/wic": [{"word": "a", "sentence1": "b", "sentence2": "c", "label": True}],
    }.items(),
)
def test_an_odd_value_anywhere_in_a_record_is_named_or_leaves_a_whole_example(task, records, tmp_path):
    path, refused = tmp_path / "data.jsonl", 0
    for number, record in enumerate(records):
        for changed in with_odd_values(record):
            lines(path, *records[:number], changed, *records[number + 1 :])
            try:
                examples = load_task(task, "test", path)
            except ptmoe.PtmoeError:
                refused += 1
                continue
            for example in examples:
                assert example.input.strip(), changed
                assert example.target.strip(), changed
                assert all(reference not in ("nan", "True") for reference in example.references), changed
    assert refused > 10


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_where_a_chunk_ends_changes_nothing(chunk, tmp_path, monkeypatch):
    def read():
        read_so = {}
        for damage in (b"", b'"ID"', b'"ID": "chal-2"', b"},", b"cups", b"title", b'"qas": [', b"]"):
            for name in ("svamp", "squad"):
                task, path, _ = files(tmp_path)[name]
                path.write_bytes(path.read_bytes().replace(damage, b"", 1) if damage else path.read_bytes())
                problems = Problems(skip=True)
                try:
                    examples = load_task(task, "test", path, problems=problems)
                except ptmoe.PtmoeError as error:
                    examples = str(error)
                read_so[name, damage] = examples, problems.listed()
        return read_so

    whole = read()
    assert len({str(outcome) for outcome in whole.values()}) > 8
    monkeypatch.setattr("ptmoe.tasks.records._CHUNK", chunk)
    assert read() == whole


@pytest.mark.parametrize("task", ["svamp", "gsm8k"])
def test_a_value_nested_too_deep_is_named_by_file_and_line(task, tmp_path):
    (tmp_path / "data").write_text({"svamp": "[", "gsm8k": '{"question": '}[task] + "[" * 100_000)
    with pytest.raises(ptmoe.PtmoeError, match=r"data:1: not JSON that can be read \(nested too deep\)"):
        load_task(task, "test", tmp_path / "data")


def test_all_bad_records_are_counted_and_the_first_are_listed(tmp_path):
    path = lines(tmp_path / "test.jsonl", GSM8K[0], *['{"question": "a"}'] * 9)
    with pytest.raises(
        ptmoe.PtmoeError, match=rf"9 bad record\(s\)[\s\S]*and {9 - SHOWN} more, all listed in .*\n.*--skip-bad"
    ):
        load_task("gsm8k", "test", path)


def test_ids_that_repeat_and_files_without_examples_are_refused(tmp_path):
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps([SVAMP[0], SVAMP[0]], indent=1))
    with pytest.raises(ptmoe.PtmoeError, match=r"id 'chal-1' was used before, at .*SVAMP\.json:2"):
        load_task("svamp", "test", path)
    path.write_text("[]")
    with pytest.raises(ptmoe.PtmoeError, match="holds no example"):
        load_task("svamp", "test", path)
    path.write_text("")
    with pytest.raises(ptmoe.PtmoeError, match="is empty"):
        load_task("svamp", "test", path)
    with pytest.raises(ptmoe.PtmoeError, match="no data file or folder"):
        load_task("svamp", "test", tmp_path / "nowhere")
    with pytest.raises(ptmoe.PtmoeError, match=r"holds no test split of asdiv: looked for ASDiv\.xml"):
        load_task("asdiv", "test", tmp_path)
    with pytest.raises(ptmoe.PtmoeError, match="task 'svamp' has no split 'tset'; did you mean 'test'"):
        load_task("svamp", "tset", path)
    with pytest.raises(ptmoe.PtmoeError, match=r"svamp has no train split in a file \(SVAMP\.json has no split"):
        load_task("svamp", "train", path)


def test_only_the_ids_in_a_file_are_loaded(tmp_path):
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps(SVAMP))
    ids = tmp_path / "ids"
    for written in ("chal-2\n", '["chal-2"]', "\ufeffchal-2"):
        ids.write_text(written)
        assert [example.id for example in load_task("svamp", "test", path, ids=ids)] == ["chal-2"]
        ids.write_bytes(gzip.compress(written.encode()))
        assert [example.id for example in load_task("svamp", "test", path, ids=ids)] == ["chal-2"]
    ids.write_text("chal-2\nchal-9\n")
    with pytest.raises(ptmoe.PtmoeError, match=r"names 1 id\(s\) that svamp lacks: chal-9"):
        load_task("svamp", "test", path, ids=ids)
    ids.write_text("chal-2\nchal-2\n")
    with pytest.raises(ptmoe.PtmoeError, match=r"1 id\(s\) twice: chal-2"):
        load_task("svamp", "test", path, ids=ids)
    ids.write_text("\n")
    with pytest.raises(ptmoe.PtmoeError, match="holds no id"):
        load_task("svamp", "test", path, ids=ids)


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A folder with a train split for two tasks: 20 and 50 examples."""
    for name, count in (("gsm8k", 20), ("mawps", 50)):
        (tmp_path / name).mkdir()
        records = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(count)]
        if name == "mawps":
            records = [{"original_text": f"{n} ?", "ans": n} for n in range(count)]
            (tmp_path / name / "train.json").write_text(json.dumps(records))
        else:
            lines(tmp_path / name / "train.jsonl", *records)
    return tmp_path


def test_a_mixture_without_weights_holds_every_example_once_and_begins_evenly(root):
    examples = load_task("gsm8k,mawps", "train", root)
    assert Counter(example.task for example in examples) == {"gsm8k": 20, "mawps": 50}
    assert len({example.id for example in examples}) == 70
    assert Counter(example.task for example in examples[:20]) == {"gsm8k": 10, "mawps": 10}
    assert {example.domain for example in examples} == {"gsm8k", "mawps"}


@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((3, 1), 0.75), ((0.5, 2), 0.2)])
def test_a_weighted_mixture_keeps_its_proportions_from_the_first_example_to_the_last(root, weights, share):
    examples = load_task(f"gsm8k={weights[0]},mawps={weights[1]}", "train", root)
    taken = 0
    for number, example in enumerate(examples, 1):
        taken += example.task == "gsm8k"
        assert abs(taken - share * number) <= 1
    left = {"gsm8k": 20 - taken, "mawps": 50 - (len(examples) - taken)}
    assert min(left.values()) <= 1, "it ends where a task has no more"
    assert all(count >= 0 for count in left.values())


def test_groups_are_what_the_paper_evaluates_on():
    assert task_names("mrqa-in") == [
        f"mrqa/{n}" for n in "squad newsqa triviaqa searchqa hotpotqa naturalquestions".split()
    ]
    assert task_names("mrqa-out") == [
        f"mrqa/{n}" for n in "bioasq drop duorc race relationextraction textbookqa".split()
    ]
    assert task_names("math-out") == ["svamp", "asdiv", "mawps", "math_problems"]
    assert len({*task_names("mrqa-in"), *task_names("mrqa-out"), "gsm8k", *task_names("math-out")}) == 17
    assert all(member in TASKS for members in GROUPS.values() for member in members)


def test_unfit_mixtures_are_refused(root):
    for name, message in {
        "gsm8k=2,mawps": "some tasks in .* have a weight and some have none",
        "gsm8k=0,mawps=1": "weight '0' in 'gsm8k=0': needs a number above 0",
        "gsm8k=x": "weight 'x'",
        "gsm8k=nan": "weight 'nan'",
        "gsm8k,gsm8k": "task 'gsm8k' appears twice",
        "mrqa-in,mrqa/squad": "task 'mrqa/squad' appears twice",
        "gsm8k,svmap": "unknown task 'svmap'; did you mean 'svamp'",
    }.items():
        with pytest.raises(ptmoe.PtmoeError, match=message):
            load_task(name, "train", root)
    file = str(root / "gsm8k" / "train.jsonl")
    for name in (f"{file},mawps", f"mawps=1,{file}=2"):
        with pytest.raises(ptmoe.PtmoeError, match=r"train\.jsonl is a file, and .* mixes tasks"):
            load_task(name, "train", root)
    with pytest.raises(ptmoe.PtmoeError, match=r"gsm8k is a folder, and .* mixes tasks"):
        load_task(f"{root / 'gsm8k'},mawps", "train", root)
    with pytest.raises(ptmoe.PtmoeError, match=r"2 tasks \(gsm8k, mawps\) and one file"):
        load_task("gsm8k,mawps", "train", root / "gsm8k" / "train.jsonl")


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mrqa", "squad", "asdiv", "svamp"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(form, tmp_path):
    def written(count):
        path = tmp_path / f"{form}-{count}"
        passage = "The key is in the box. " * 80
        if form == "mrqa":
            record = {"context": passage, "qas": [MRQA_LINES[1]["qas"][1]]}
            with gzip.open(path, "wt") as file:
                file.writelines(json.dumps(record) + "\n" for _ in range(count))
        elif form == "squad":
            article = json.dumps(
                {"title": "t", "paragraphs": [{"context": passage, "qas": SQUAD["data"][0]["paragraphs"][0]["qas"]}]}
            )
            path.write_text('{"version": "1.1", "data": [' + ", ".join([article] * count) + "]}")
        elif form == "asdiv":
            head, _, rest = ASDIV.partition("\t<Problem")
            problem, _, _ = rest.partition("\t<Problem")
            body = ("\t<Problem" + problem).replace("Seven", passage)
            path.write_text(head + body * count + "</ProblemSet></Machine-Reading-Corpus-File>")
        else:
            path.write_text(json.dumps([{**SVAMP[0], "Body": passage}] * count))
        return path

    def peak(path):
        tracemalloc.start()
        count = sum(1 for _ in stream_task({"mrqa": "mrqa/drop", "squad": "mrqa/squad"}.get(form, form), "test", path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, peak

    (few, small), (many, large) = peak(written(2000)), peak(written(12_000))
    assert many == 6 * few
    assert large < 1.2 * small + 200_000
    assert large < 16e6


# ---- downloads -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def served(content, announced=None):
    """A server on this machine that gives `content`, and says that it is `announced` bytes long."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/file" else 404)
            self.send_header("Content-Length", str(announced or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file"
    finally:
        server.shutdown()


@pytest.fixture
def released(monkeypatch):
    """`mrqa/drop` as if it were released at another address, with the MD5 of `content`."""

    def at(url, content):
        task = TASKS["mrqa/drop"]
        split = Split(2, task.splits["test"].files, "", url, hashlib.md5(content).hexdigest())
        monkeypatch.setitem(TASKS, "mrqa/drop", replace(task, splits={"test": split}))

    return at


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


def test_a_released_file_is_downloaded_once_and_verified(released, tmp_path):
    content = gzip.compress("".join(json.dumps(line) + "\n" for line in MRQA_LINES).encode())
    messages = []
    with served(content) as url:
        released(url, content)
        assert [example.id for example in load_task("mrqa/drop", say=messages.append)] == ["q1", "q2"]
    assert messages == [f"downloading {url}"]
    assert len(load_task("mrqa/drop", say=messages.append)) == 2  # the server is gone
    assert len(messages) == 1
    assert kept(tmp_path) == [hashlib.md5(content).hexdigest() + ".jsonl.gz"]


@pytest.mark.ci
def test_a_wrong_md5_and_a_short_download_name_both_sums_and_keep_nothing(released, tmp_path):
    content = gzip.compress(b"{}")
    sums = [hashlib.md5(data).hexdigest() for data in (content, content + b"!")]
    for announced, message in ((None, ""), (10 * len(content), f" after {len(content)} of {10 * len(content)} bytes")):
        with served(content, announced) as url:
            released(url, content + b"!")
            with pytest.raises(
                ptmoe.PtmoeError, match=rf"MD5 {sums[0]}{message}, the release {sums[1]}; nothing is kept"
            ):
                load_task("mrqa/drop")
        assert kept(tmp_path) == []


def test_a_data_set_found_nowhere_names_the_places_that_were_tried(released, tmp_path):
    with served(b"") as url:
        released(url.replace("/file", "/other"), b"")
        with pytest.raises(
            ptmoe.PtmoeError, match=r"to download \(.*404.*give its file, or the folder that holds dev/DROP"
        ):
            load_task("mrqa/drop")
    released("http://127.0.0.1:9/none", b"")
    with pytest.raises(ptmoe.PtmoeError, match=r"refused.*--data-dir"):
        load_task("mrqa/drop")
    with pytest.raises(ptmoe.PtmoeError, match=r"math_problems has no test split to download"):
        load_task("math_problems")
    assert kept(tmp_path) == []


def test_the_sizes_and_md5_sums_of_mrqa_are_the_published_ones():
    reference = SHARED.parent / "reference" / "README.md"
    if not reference.exists():
        pytest.skip("needs the published sums")
    text = " ".join(reference.read_text().split())
    splits = [split for name in MRQA for split in TASKS[name].splits.values()]
    assert len(splits) == 18
    for split in splits:
        assert f"{split.examples:,} {split.md5}" in text


def test_the_data_folder_of_the_environment_is_used_first(root, monkeypatch):
    monkeypatch.setenv("PTMOE_DATA_DIR", str(root))
    assert len(load_task("gsm8k", "train")) == 20


# ---- the Hub: `datasets` loads a folder as it loads a repository -----------------------------------------------------

HUB = {
    "gsm8k": (GSM8K, ["5", "1,234"]),
    "svamp": (
        [{**problem, "Answer": str(problem["Answer"]), "question_concat": ""} for problem in SVAMP],
        ["51", "2.5"],
    ),
    "asdiv": (
        [{"body": "Two cups.", "question": "How many?", "solution_type": "Sum", "answer": "2 (cups)", "formula": "2"}],
        ["2 (cups)"],
    ),
    "mawps": (GSM8K, ["5", "1,234"]),
    "mrqa/newsqa": (
        [
            {
                "subset": subset,
                "context": "It is Delhi.",
                "context_tokens": {"tokens": ["It"], "offsets": [0]},
                "qid": f"q-{subset}",
                "question": "Where?",
                "detected_answers": spans,
                "answers": ["Delhi"],
            }
            for subset, spans in (
                ("NewsQA", {"text": ["Delhi"], "char_spans": [{"start": [6], "end": [10]}]}),
                ("SQuAD", {"text": ["Delhi"], "char_spans": [{"start": [6], "end": [10]}]}),
            )
        ],
        ["Delhi"],
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_a_copy_on_the_hub_is_read_through_datasets(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows, references = HUB[name]
    task = TASKS[name]
    split = task.splits["test"]
    folder = tmp_path / "repository"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / f"{split.hub}-00000-of-00001.parquet"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    hub = replace(task.hub, repository=str(folder), config=None)
    monkeypatch.setitem(TASKS, name, replace(task, hub=hub, splits={"test": replace(split, url="")}))
    examples = load_task(name)
    assert [example.references[0] for example in examples] == references
    assert set(ptmoe.score(name, references, examples).values()) == {100.0}
    if name == "mrqa/newsqa":
        assert examples[0].id == "q-NewsQA"
        assert examples[0].input[slice(*examples[0].answer)] == "Delhi"


def test_without_the_hub_the_message_says_what_to_do(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ptmoe.PtmoeError, match=r"openai/gsm8k \(test\) cannot be loaded .*--data-dir"):
        load_task("gsm8k")


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_predictions_are_read_in_each_form(tmp_path):
    path = tmp_path / "p"
    for written in (
        '{"a": "1", "b": "2"}',
        '{\n "a": "1",\n "b": "2"\n}',
        '{"id": "a", "completion": "1"}\n\n{"id": "b", "completion": "2"}\n',
        '{"qid": "a", "prediction_text": "1"}\n{"qid": "b", "prediction_text": "2"}\n',
        '[{"id": "a", "prediction": 1}, {"id": "b", "prediction": 2}]',
        '[{"id": "a", "answer": "gold", "completion": 1}, {"id": "b", "answer": "gold", "completion": 2}]',
    ):
        path.write_text(written)
        assert read_predictions(path) == {"a": "1", "b": "2"}
        path.write_bytes(gzip.compress(written.encode()))
        assert read_predictions(path) == {"a": "1", "b": "2"}
    path.write_text('{"id": 7.0, "completion": "1"}\n{"id": 8.50, "completion": "2"}\n')
    assert read_predictions(path) == {"7.0": "1", "8.50": "2"}  # as the examples' own ids are read
    path.write_text(
        '{"id": "a", "completion": "", "answered": false}\n{"id": "b", "completion": "2", "answered": true}\n'
    )
    assert read_predictions(path) == {"a": None, "b": "2"}
    path.write_bytes(gzip.compress(json.dumps({str(each): "1" * 99 for each in range(9_999)}).encode())[:-4])
    with pytest.raises(ptmoe.PtmoeError, match="p: damaged gzip"):
        read_predictions(path)


def test_bad_predictions_are_named(tmp_path):
    path = tmp_path / "p"
    for written, message in {
        '{"id": "a", "text": "1"}\n{"text": "2"}\n': r"p:2: lacks an id \(has 'text'\)",
        '{"id": "a", "text": "1"}\n{"id": "a", "text": "2"}\n': "p:2: id 'a' was used before, at .*p:1",
        '{"a": "1", "a": "2"}': "id 'a' was used before",
        '{"id": "a"}\n': "p:1: lacks the predicted text",
        '{"id": NaN, "text": "1"}\n': "p:1: lacks an id",
        '{"a": 1.5, "b": ["x"]}': "id 'b': the prediction is list",
        '{"id": "a", "text": "1"}\n{"id": ': "p:2: not JSON",
        '{"id": "a", "answer": "gold", "output": "1"}\n': "p:1: has 'answer' and 'output': call the predicted text",
        '{"id": "a", "text": "Where?", "output": "1"}\n': "p:1: has 'output' and 'text': call the predicted text",
        "a,b\n1,2\n": "neither JSON nor JSON lines",
        "{}": "holds no prediction",
        "": "is empty",
    }.items():
        path.write_text(written)
        with pytest.raises(ptmoe.PtmoeError, match=message):
            print(read_predictions(path))
    with pytest.raises(ptmoe.PtmoeError, match="no predictions file"):
        read_predictions(tmp_path / "none")


def test_missing_predictions_are_refused_or_score_0(tmp_path):
    examples = load_task("mrqa/squad", "test", files(tmp_path)["squad"][1])
    with pytest.raises(ptmoe.PtmoeError, match=r"lack 1 id\(s\) \['s2'\] and hold 1 unknown id\(s\) \['s9'\]"):
        ptmoe.score("mrqa/squad", {"s1": "Delhi", "s9": "x"}, examples)
    with pytest.raises(ptmoe.PtmoeError, match="hold 1 unknown"):
        ptmoe.score("mrqa/squad", {"s1": "Delhi", "s9": "x"}, examples, missing_as_wrong=True)
    scores = ptmoe.score("mrqa/squad", {"s1": "the delhi!"}, examples, missing_as_wrong=True)
    assert scores == {"exact_match": 50.0, "f1": 50.0}


def test_the_sources_of_a_task_are_tried_in_order(root, released, tmp_path):
    """A folder that was asked for is the only place; nothing is downloaded beside it."""
    with served(b"x") as url:
        released(url, b"x")
        with pytest.raises(ptmoe.PtmoeError, match="holds no test split of mrqa/drop"):
            load_task("mrqa/drop", "test", root)
    assert sources.cached(TASKS["mrqa/drop"].splits["test"]).exists() is False
