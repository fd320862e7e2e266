"""Text that users, data sets and models bring is shown as it is, and a folder has one writer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from ptmoe.cli.console import Console
from ptmoe.files import printable
from ptmoe.runs.folders import writing

HOSTILE = ["[/b]", "[bold]x", ":smile:", "\x1b[31mred", "\x9b2J", "a\x08b", "[link=x]y[/link]"]


@given(st.text())
def test_what_is_printed_controls_no_terminal_and_loses_nothing(text):
    shown = printable(text)
    assert not any((ord(char) < 32 and char not in "\t\n") or 127 <= ord(char) < 160 for char in shown)
    assert [char for char in shown if char.isalpha() and ord(char) > 160] == [
        char for char in text if char.isalpha() and ord(char) > 160
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_lines_and_tables_show_the_text_itself(text, capsys):
    console = Console(width=200)
    table = Table(text)
    table.add_row(text)
    console.print(text)
    console.print(table)
    assert capsys.readouterr().out.count(printable(text)) == 3


def test_a_domain_that_looks_like_markup_ends_no_command(run, tmp_path):
    data = tmp_path / "[red]data.jsonl"
    lines = [{"id": f"{n}", "prompt": "a b", "completion": " c", "domain": text} for n, text in enumerate(HOSTILE)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": line["id"], "text": "c"}) + "\n" for line in lines))
    status, out, err = run("score", data, answers)
    assert status == 0, err
    assert all(printable(text) in out for text in HOSTILE)
    status, out, err = run("eval", "--model", "nano", "--task", data, "--output-dir", tmp_path / "[b]out")
    assert status == 0, err
    assert all(printable(text) in out for text in HOSTILE)
    assert "\x1b" not in out


def test_a_folder_has_one_writer_and_the_second_is_refused_in_words(run, tmp_path):
    folder = tmp_path / "run"
    with writing(folder):
        (folder / "kept").touch()
        train = ("train", "--task", "nano/mixed", "--output-dir", folder)
        for command in (train, ("eval", "--model", "nano", "--task", "nano/mixed", "--output-dir", folder)):
            status, _, err = run(*command)
            assert (status, "another command is writing to" in err) == (2, True), err
    assert {path.name for path in folder.iterdir()} == {"kept", ".lock"}
    with writing(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()


def test_a_folder_that_cannot_be_written_ends_in_words(run, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = run("train", "--task", "nano/mixed", "--output-dir", tmp_path / "file" / "run")
    assert (status, err.startswith("error: "), "Traceback" in err) == (2, True, False)
