"""Records as other software exports them: every number and text as it was written, or refused by file and line."""

import csv
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ptmoe
from ptmoe.tasks import Problems, load_task
from ptmoe.tasks.local import Keys, load
from ptmoe.tasks.other_files import other_form
from ptmoe.tasks.problems import BadRecordError
from ptmoe.tasks.records import number_text, text_of
from ptmoe.tasks.written import Written


@pytest.fixture
def written(tmp_path):
    def write(*lines, name="d.jsonl"):
        path = tmp_path / name
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


# ---- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=12).map(str).filter(lambda text: "E" not in text),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["9007199254740993", "12345678901234567891", "0.1000", "51.0", "-0.0", "1e400", "1E-400", "2.50"]),
)


@settings(max_examples=300)
@given(NUMBERS)
def test_a_number_keeps_its_value_and_its_digits(text):
    read = text_of({"n": json.loads(text, parse_float=Written)}, "n")
    assert Decimal(read) == Decimal(text)
    assert read == text or Decimal(text) == Decimal(text).to_integral_value(), "51.0 is written as 51"
    assert number_text(text) == read
    assert number_text(read) == read


def test_numbers_come_through_each_reader_as_they_were_written(written):
    texts = ["12345678901234567891", "9007199254740993", "0.12345678901234567890123", "2.50"]
    lines = [f'{{"prompt": "n{i} =>", "completion": {text}}}' for i, text in enumerate(texts)]
    assert [example.references[0] for example in load(written(*lines))] == texts
    array = ", ".join(f'{{"question": "n{i}?", "answer": {text}}}' for i, text in enumerate(texts))
    examples = load_task("math_problems", data_dir=written(f"[{array}]", name="m.json"))
    assert [example.references[0] for example in examples] == texts


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_a_bad_record(constant, written):
    good = '{"prompt": "a =>", "completion": " 5"}'
    for bad in (f'{{"prompt": "a =>", "completion": {constant}}}', f'{{"prompt": {constant}, "completion": " 3"}}'):
        path = written(good, bad)
        with pytest.raises(ptmoe.PtmoeError, match=rf"d\.jsonl:2: '\w+' is {float(constant)}, needs text"):
            load(path)
        assert len(load(path, problems=Problems(skip=True))) == 1
    with pytest.raises(ptmoe.PtmoeError, match=r"m\.json:1: 'answer' is "):
        load_task("math_problems", data_dir=written(f'[{{"question": "a?", "answer": {constant}}}]', name="m.json"))


CALLING = """{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]},
 {"role": "assistant", "content": "b"}]TOOLS}""".replace("\n", "")
WITH_NUMBERS = [
    CALLING.replace("CALL", '{"function": {"name": "f", "arguments": {"x": [NUMBER]}}}').replace("TOOLS", ""),
    CALLING.replace("CALL", '{"function": {"name": "f"}}').replace("TOOLS", ', "tools": [{"x": {"y": NUMBER}}]'),
]
KEEPS = ["7", "0.10", "1e3", "12345678901234567891"]
LOSES = ["NaN", "-Infinity", "1e400", f"1e-{10**20}", "0.12345678901234567890123"]


@pytest.mark.parametrize("number", KEEPS + LOSES)
@pytest.mark.parametrize("line", WITH_NUMBERS)
def test_a_number_that_no_template_writes_as_it_stands_is_a_bad_record(number, line, written):
    path = written('{"prompt": "a", "completion": "b"}', line.replace("NUMBER", number))
    if number in KEEPS:
        assert len(load(path)) == 2
        return
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: '\w+' holds the number .* cannot write"):
        load(path)
    assert len(load(path, problems=Problems(skip=True))) == 1


@pytest.mark.parametrize(
    "twice",
    ['{"prompt": "a", "completion": "b", "prompt": "c"}', '{"question": "a", "answer": 1, "answer": 2}',
     '{"messages": [{"role": "user", "content": "a", "content": "c"}, {"role": "assistant", "content": "b"}]}'],
)  # fmt: skip
def test_a_key_that_stands_twice_is_a_bad_record_and_the_next_is_read(twice, written):
    good = '{"prompt": "a", "completion": "b"}'
    path = written(good, twice, '{"prompt": "broken', good)
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: has the key '\w+' twice\n.*d\.jsonl:3: not JSON"):
        load(path)
    assert len(load(path, problems=Problems(skip=True))) == 2
    row = '{"question": "a", "answer": 1}'
    path = written(f"[{row},\n{twice},\n{row}]", name="m.json")
    with pytest.raises(ptmoe.PtmoeError, match=r"m\.json:2: has the key '\w+' twice"):
        load_task("math_problems", data_dir=path)
    assert len(load_task("math_problems", data_dir=path, problems=Problems(skip=True))) == 2


def test_an_integer_longer_than_python_reads_is_a_bad_record(written):
    path = written({"prompt": "a", "completion": "b"}, f'{{"prompt": "a", "completion": {"9" * 5000}}}')
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: not JSON that can be read \(Exceeds the limit"):
        load(path)
    with pytest.raises(ptmoe.PtmoeError, match=r"m\.json:1: not JSON that can be read"):
        load_task("math_problems", data_dir=written(f'[{{"question": "a", "answer": {"9" * 5000}}}]', name="m.json"))


# ---- ids and domains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["null", "NaN", '""'])
def test_a_missing_id_or_domain_counts_as_not_given(missing, written):
    lines = [f'{{"id": {missing}, "domain": {missing}, "prompt": "{c} =>", "completion": " 3"}}' for c in "abc"]
    examples = load(written(*lines))
    assert [(example.id, example.domain) for example in examples] == [("d-1", ""), ("d-2", ""), ("d-3", "")]
    rows = ", ".join(f'{{"id": {missing}, "question": "{c}?", "answer": 1}}' for c in "abc")
    problems = load_task("math_problems", data_dir=written(f"[{rows}]", name="m.json"))
    assert [example.id for example in problems] == ["test-0", "test-1", "test-2"]


def test_ids_are_kept_as_they_are_and_a_list_is_none(written):
    ids = [7, "7a", 12345678901234567891, 1.50]
    path = written(*(f'{{"id": {json.dumps(one)}, "prompt": "a", "completion": "b"}}' for one in ids[:3]))
    assert [example.id for example in load(path)] == ["7", "7a", "12345678901234567891"]
    for key, value in (("id", [1]), ("id", True), ("domain", False)):
        kind = type(value).__name__
        with pytest.raises(ptmoe.PtmoeError, match=rf"d\.jsonl:1: '{key}' is {kind}, needs text or a number"):
            load(written({key: value, "prompt": "a", "completion": "b"}))


# ---- text ------------------------------------------------------------------------------------------------------------

HALF = r"\ud83d"
FORMS = [
    f'{{"prompt": "smile {HALF} =>", "completion": " 1"}}',
    f'{{"prompt": "a", "completion": "{HALF}"}}',
    f'{{"id": "{HALF}", "prompt": "a", "completion": "b"}}',
    f'{{"domain": "{HALF}", "prompt": "a", "completion": "b"}}',
    f'{{"question": "a", "context": "{HALF} b", "answers": ["b"]}}',
    f'{{"question": "a", "context": "b", "answers": ["b", "{HALF}"]}}',
    f'{{"messages": [{{"role": "user", "content": "{HALF}"}}, {{"role": "assistant", "content": "b"}}]}}',
    f'{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b", "name": "{HALF}"}}]}}',
    f'{{"tools": [{{"{HALF}": 1}}], "messages": [{{"role": "user", "content": "a"}}, '
    '{"role": "assistant", "content": "b"}]}',
]


@pytest.mark.parametrize("line", FORMS)
def test_half_a_character_is_a_bad_record_wherever_it_stands(line, written):
    path = written({"prompt": "a", "completion": "b"}, line)
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: not Unicode text: \\ud83d is half of a character"):
        load(path)
    assert len(load(path, problems=Problems(skip=True))) == 1
    whole = line.replace(HALF, r"\ud83d\ude00")
    assert len(load(written({"prompt": "a", "completion": "b"}, whole))) == 2


def test_half_a_character_in_a_named_tasks_file_is_one_too(written):
    path = written(f'[{{"question": "{HALF}", "answer": 1}}]', name="m.json")
    with pytest.raises(ptmoe.PtmoeError, match=r"m\.json:1: not Unicode text"):
        load_task("math_problems", data_dir=path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
SOME_KEYS = st.sampled_from("id domain prompt completion question context answers messages tools role content".split())


@settings(max_examples=200)
@given(st.lists(st.dictionaries(SOME_KEYS, JSON, max_size=5), min_size=1, max_size=4))
@pytest.mark.ci
def test_any_record_is_read_or_refused_by_its_line_and_none_is_lost(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [{"prompt": "a", "completion": "b"}, *records]))
    problems = Problems(skip=True)
    examples = load(path, problems=problems)
    assert len(examples) + problems.count == 1 + len(records)
    assert all(example.place.startswith(f"{path}:") for example in examples)
    for example in examples:
        json.dumps([example.contents, example.references], ensure_ascii=False).encode()
    if problems.count:
        with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:\d"):
            load(path)


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_without_a_text_to_grade_or_with_unfit_extras_is_refused(written):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    for record, message in (
        ({"messages": [turns[0], call]}, "the assistant's answer needs a text as its 'content'"),
        ({"messages": [turns[0], {"role": "assistant", "content": None}]}, "'messages' needs a list"),
        ({"messages": turns, "tools": "adder"}, "'tools' needs a list of objects"),
        ({"messages": turns, "documents": ["a"]}, "'documents' needs a list of objects"),
        ({"messages": turns, "chat_template_kwargs": ["a"]}, "'chat_template_kwargs' needs an object"),
    ):
        with pytest.raises(ptmoe.PtmoeError, match=f"d.jsonl:1: {message}"):
            load(written(record))
    (example,) = load(
        written({"messages": [turns[0], call, {"role": "tool", "content": "4"}, turns[1]], "tools": None})
    )
    assert example.messages[1] == call
    assert (example.reply, example.template) == ({}, {})


# ---- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ('[{"prompt": "a", "completion": "b"}]', "a JSON array: convert it with: python -c"),
        ('[\n  {"prompt": "a"}\n]', "a JSON array"),
        ("[]", "a JSON array"),
        ("prompt,completion\na,b\n", "CSV: convert it with: python -c"),
        ("prompt\tcompletion\na\tb\n", "TSV: convert it with: python -c"),
        ("prompt;completion\na, b;c\n", "CSV with ';' between its fields: convert it with: python -c"),
        ("prompt|completion\na|b\n", "CSV with '|' between its fields"),
        ("prompt,completion,prompt\na,b,c\n", "CSV whose header has 'prompt' twice"),
        ('[["prompt", "completion"],\n ["a", "b"]]', "a JSON array, and not of objects"),
        ('["a,b", "c,d"]', "a JSON array, and not of objects"),
        ("PAR1\x15\x04,,;\0", "a Parquet file: convert it with: python -c"),
        ("PK\x03\x04\x14,\0;", "a ZIP archive or a table of Excel"),
        ("GGUF,\0\0;", "a binary file"),
        ('{\n  "prompt": "a",\n  "completion": "b"\n}', "one JSON object over several lines"),
        ("<html><body>404</body></html>", "XML or HTML"),
    ],
)
def test_a_file_that_holds_no_json_lines_is_named_once_with_what_to_do(text, form, written):
    path = written(text, name="data.json")
    with pytest.raises(ptmoe.PtmoeError) as error:
        load(path, problems=Problems(skip=True))
    assert f"{path} is {form}" in str(error.value)
    assert "needs JSON lines, one object a line" in str(error.value)
    assert "bad record" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "completion": "b"}',
        '\n\n{"a": 1}',
        '["a"]\n{"b": 1}',
        "x, y\n{}",
        "x",
        "[1, 2]\n[3]",
        '["a", "b"]\n["c", "d"]',
    ],
)
def test_json_lines_are_read_as_such_even_where_some_are_damaged(text, written):
    assert other_form(written(text)) == ""


def converted(path):
    """The lines that the command in the message writes."""
    python, option, code, *rest = shlex.split(other_form(path).partition("convert it with: ")[2])
    assert (python, option, rest) == ("python", "-c", [">", "data.jsonl"])
    with patch("sys.stdout", io.TextIOWrapper(io.BytesIO())) as out:
        exec(code)
        return out.buffer.getvalue().decode()


FIELDS = st.text(st.sampled_from("aä5 ,;|\t\"'\n\u2028😀"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=4),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_the_command_converts_a_table_of_any_kind_to_the_texts_it_holds(
    tmp_path_factory, rows, delimiter, encoding, end, zipped
):
    path = tmp_path_factory.mktemp("table") / "it's.csv"
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([("prompt", "completion", "note, or; more|"), *rows])
    written = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(written) if zipped else written)
    lines = path.with_name("data.jsonl")
    lines.write_text(converted(path), encoding="utf-8")
    assert [(example.input, example.target) for example in load(lines)] == [row[:2] for row in rows]


@settings(max_examples=100)
@given(
    st.lists(st.tuples(NUMBERS, FIELDS), min_size=1, max_size=4),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from([None, 2]),
)
def test_the_command_converts_an_array_to_the_records_as_they_are_written(tmp_path_factory, rows, encoding, indent):
    path = tmp_path_factory.mktemp("array") / "d.json"
    records = [{"prompt": text, "completion": f"N{number}"} for number, (_, text) in enumerate(rows)]
    text = json.dumps(records, ensure_ascii=False, indent=indent)
    for number, (digits, _) in enumerate(rows):
        text = text.replace(f'"N{number}"', digits)
    path.write_bytes(text.encode(encoding))
    lines = path.with_name("data.jsonl")
    lines.write_text(converted(path), encoding="utf-8")
    for (digits, prompt), line in zip(rows, lines.read_text(encoding="utf-8").split("\n"), strict=False):
        assert digits in line
        assert json.loads(line)["prompt"] == prompt
    assert [example.target for example in load(lines)] == [number_text(digits) for digits, _ in rows]


def test_what_is_wrong_with_a_record_is_still_found_behind_the_command(written):
    path = written(
        '[{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "prompt": "c"}]', name="d.json"
    )
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: has the key 'prompt' twice"):
        load(written(converted(path)))
    for text, message in (
        ("prompt,completion\na,b\na,b,c\n", r"d\.csv: line 3: 3 fields, the header has 2"),
        ('prompt,completion\na,"b\n', r"d\.csv: unexpected end of data"),
        ('[{"prompt": "a"}] [{"prompt": "b"}]', r"d\.csv: more behind the array's end"),
        ('[{"prompt": "a"}, ', r"d\.csv: "),
        ('[{"prompt": "a"}{"prompt": "b"}]', r"d\.csv: no comma between two records"),
    ):
        with pytest.raises(SystemExit, match=message):
            converted(written(text, name="d.csv"))
    assert converted(written("[ ]", name="d.json")) == ""


def test_the_command_is_one_of_a_shell(written, tmp_path):
    path = written('[{"prompt": "ä", "completion": 2.50}]', name="it's `a` $HOME.json")
    command = other_form(path).partition("convert it with: ")[2].replace("python", f"'{sys.executable}'", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (example,) = load(tmp_path / "data.jsonl")
    assert (example.input, example.target) == ("ä", "2.50")


def test_text_in_other_encodings_is_named(tmp_path):
    line = '{"prompt": "ä", "completion": "b"}\n'
    (tmp_path / "d.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl is text in UTF-16: convert it with: iconv"):
        load(tmp_path / "d.jsonl")
    (tmp_path / "d.csv").write_bytes("prompt,completion\nä,b\n".encode("latin-1"))
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.csv is CSV, and not in UTF-8: save it in UTF-8 first"):
        load(tmp_path / "d.csv")


def test_a_parquet_file_is_converted_with_its_values(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"prompt": ["ä", "b"], "completion": [0.1, 12345.678901234567]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    code = shlex.split(other_form(tmp_path / "d.parquet").partition("convert it with: ")[2])[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (tmp_path / "d.jsonl").write_text(done.stdout)
    assert [(example.input, example.target) for example in load(tmp_path / "d.jsonl")] == [
        ("ä", "0.1"), ("b", "12345.678901234567")
    ]  # fmt: skip


def test_records_behind_an_arrays_end_are_not_lost_without_a_word(written):
    row = '[{"question": "a", "answer": 1}]'
    path = written(f"{row}\n\n{row}", name="m.json")
    with pytest.raises(ptmoe.PtmoeError, match=r"m\.json:3: more behind the array's end"):
        load_task("math_problems", data_dir=path)
    assert len(load_task("math_problems", data_dir=written(f"{row}\n\n ", name="m.json"))) == 1


# ---- forms of a line -------------------------------------------------------------------------------------------------

ONE_FORM = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
    "prompt": {"prompt": "a", "completion": "b"},
    "question": {"question": "c", "answers": ["d"]},
}


@pytest.mark.parametrize("first", ONE_FORM)
@pytest.mark.parametrize("second", ONE_FORM)
def test_a_line_of_two_forms_is_refused_and_null_counts_as_not_given(first, second, written):
    if first == second:
        return
    path = written(ONE_FORM["prompt"], {**ONE_FORM[first], **ONE_FORM[second]})
    with pytest.raises(ptmoe.PtmoeError, match=r"d\.jsonl:2: has \w.* as well as \w.*: needs one of them alone"):
        load(path)
    assert len(load(path, problems=Problems(skip=True))) == 1
    assert len(load(path, Keys("prompt", "completion"), Problems(skip=True))) == 1 + ("prompt" in (first, second))
    nulls = written({**dict.fromkeys(ONE_FORM[second]), **ONE_FORM[first]}, ONE_FORM[first])
    one, other = load(nulls)
    assert one.contents == other.contents


@pytest.mark.parametrize("form", ONE_FORM)
def test_what_is_for_the_template_belongs_to_every_form(form, written):
    extras = {"tools": [{"name": "f"}], "documents": [{"text": "t"}], "chat_template_kwargs": {"level": "high"}}
    (example,) = load(written({**ONE_FORM[form], **extras}))
    assert example.template == extras
    assert load(written({**ONE_FORM[form], **dict.fromkeys(extras)}))[0].template == {}
    (example,) = load(written({"tools": "a", "b": "c"}), Keys("tools", "b"))
    assert (example.input, example.template) == ("a", {})


def test_a_bad_record_is_an_error_in_words_wherever_it_is_met():
    assert issubclass(BadRecordError, ptmoe.PtmoeError)


# ---- many bad lines --------------------------------------------------------------------------------------------------

BAD = [
    "{",
    "{}",
    "[1, 2]",
    "7",
    '"text"',
    "null",
    '{"prompt": "a ="}',
    '{"completion": " b"}',
    '{"prompt": null, "completion": " b"}',
    '{"prompt": ["a"], "completion": " b"}',
    '{"prompt": true, "completion": " b"}',
    '{"prompt": " ", "completion": " b"}',
    '{"prompt": "a =", "completion": ""}',
    '{"prompt": "a =", "completion": NaN}',
    '{"prompt": "a =", "completion": -Infinity}',
    '{"prompt": "a =", "completion": " b", "id": [1]}',
    '{"prompt": "a =", "completion": " b", "domain": {}}',
    '{"prompt": "a =", "completion": " b", "id": "good-1"}',
    '{"prompt": "\\ud800", "completion": " b"}',
    b'{"prompt": "\xff\xfe", "completion": " b"}',
    '{"prompt": "a =", "completion": " b"} more',
    '{"prompt": "a =", "completion": " b"}{"prompt": "a =", "completion": " b"}',
    "{'prompt': 'a =', 'completion': ' b'}",
    '{"messages": "hello"}',
    '{"messages": [{"role": "user"}]}',
    '{"prompt": "a\tb", "completion": " b"}',
    "[" * 3000,
    "\x00",
]


def check_all_are_listed(tmp_path, lines, bad):
    """Among so many lines, spread over the file, so many bad ones of all kinds."""
    content = [
        f'{{"id": "good-{number}", "prompt": "{number} =", "completion": " {number}"}}' for number in range(lines)
    ]
    places = [2 + number * (lines - 2) // bad for number in range(bad)]
    for number, place in enumerate(places):
        content[place] = BAD[number % len(BAD)]
    path = tmp_path / "many.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in content))
    problems = Problems(skip=True)
    read = load(path, problems=problems)
    assert len(read) == lines - bad
    assert {int(example.id.rpartition("-")[2]) for example in read} == set(range(lines)) - set(places)
    said = problems.listed()
    assert said.startswith(f"{bad:d} bad record(s)")
    listed = Path(said.rpartition("all listed in ")[2].split("\n")[0])
    found = listed.read_text().splitlines()
    listed.unlink()
    numbers = [int(re.match(rf"{re.escape(str(path))}:(\d+): .", line)[1]) for line in found]
    assert sorted(numbers) == [place + 1 for place in places]
    with pytest.raises(ptmoe.PtmoeError, match=f"{bad} bad record"):
        load(path)


def test_every_bad_line_is_listed_with_its_number(tmp_path):
    check_all_are_listed(tmp_path, 400, 2 * len(BAD))


@pytest.mark.slow
def test_1000_bad_lines_among_100000_are_all_listed(tmp_path):
    check_all_are_listed(tmp_path, 100_000, 1000)
