"""What a data file is that holds no JSON lines, in words; and its records as JSON lines, each text and number as it
stands."""

import codecs
import csv
import io
import json
import re
import shlex
import sys
from pathlib import Path

from ptmoe.tasks.records import head_bytes, opened
from ptmoe.tasks.written import twice

_BINARY = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a ZIP archive or a table of Excel",
    b"\xd0\xcf\x11\xe0": "a table of an old Excel",
    b"SQLite format 3": "an SQLite database",
    b"\x28\xb5\x2f\xfd": "a file compressed by zstd",
    b"\xfd7zXZ": "a file compressed by xz",
    b"BZh": "a file compressed by bzip2",
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NAMES = {"prompt", "completion", "question", "answers", "context", "id", "domain"}  # that a header may hold
_ROWS = 20  # of a table, which show what stands between its fields
_PARQUET = (
    "import json, pyarrow.parquet as p; "
    "[print(json.dumps(row)) for batch in p.ParquetFile({path!r}).iter_batches() for row in batch.to_pylist()]"
)
_CONVERT = "from ptmoe.tasks.other_files import convert; convert({path!r}{options})"


def other_form(path: Path) -> str:
    """What a file is that holds no JSON lines, not even damaged ones, and how to convert it; "" for JSON lines."""
    start = head_bytes(path)
    if not start:  # reading says so, or reports the damage
        return ""
    for magic, name in _BINARY.items():
        if start.startswith(magic):
            return f"{name}: {_command(_PARQUET, path)}" if magic == b"PAR1" else name
    encoding = "utf-16" if start.startswith(_UTF_16) else "utf-8-sig"
    options = "" if encoding == "utf-8-sig" else f", encoding={encoding!r}"
    try:
        text, unreadable = codecs.getincrementaldecoder(encoding)().decode(start).strip(), ""
    except UnicodeDecodeError:
        text, unreadable = start.decode("latin-1").strip(), ", and not in UTF-8: save it in UTF-8 first"
    has_lines = re.search(r"^\s*\{", text, re.MULTILINE) is not None
    if re.match(r"\[\s*(?:\{|\]|$)", text):
        return "a JSON array" + (unreadable or f": {_command(_CONVERT, path, options)}")
    if re.match(r'\[\s*(?:[\["\d-]|true|false|null)', text) and not has_lines:
        return "" if _is_json_line(text) else "a JSON array, and not of objects"
    if re.match(r"\{\s*\n", text):
        return "one JSON object over several lines"
    if text.startswith("<"):
        return "XML or HTML"
    if has_lines:
        again = f"convert it with: iconv -f utf-16 -t utf-8 {shlex.quote(str(path))} > data.jsonl"
        return f"text in UTF-16: {again}" if options else ""
    if "\0" in text:
        return "a binary file"
    return _table(text, path, options, unreadable)


def _is_json_line(text: str) -> bool:
    """Whether the first of several lines is JSON by itself."""
    line, _, more = text.partition("\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return bool(more)


def _table(text: str, path: Path, options: str, unreadable: str) -> str:
    """A table's kind and how to convert it, by what stands between the fields of its header; "" if nothing does."""
    tables = {delimiter: rows for delimiter in "\t;,|" if len((rows := _first_rows(text, delimiter))[0]) > 1}
    if not tables:
        return ""

    def likelihood(delimiter: str) -> tuple[bool, int, int]:
        header, *rows = tables[delimiter]
        return not _NAMES.isdisjoint(header), sum(len(row) == len(header) for row in rows), len(header)

    delimiter = max(tables, key=likelihood)
    kind = "TSV" if delimiter == "\t" else "CSV" if delimiter == "," else f"CSV with {delimiter!r} between its fields"
    if names := twice(tables[delimiter][0]):
        return f"{kind} whose header has {names[0]!r} twice: give each column a name of its own"
    between = "" if delimiter == "," else f", delimiter={delimiter!r}"
    return kind + (unreadable or f": {_command(_CONVERT, path, between + options)}")


def _first_rows(text: str, delimiter: str) -> list[list[str]]:
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
            rows += [row] if row else []
            if len(rows) == _ROWS:
                break
    except csv.Error:  # as in a text
        pass
    return rows or [[]]


def _command(code: str, path: Path, options: str = "") -> str:
    code = re.sub(r'([\\"$`])', r"\\\1", code.format(path=str(path), options=options))
    return f'convert it with: python -c "{code}" > data.jsonl'


def convert(path: str, *, delimiter: str = ",", encoding: str = "utf-8-sig") -> None:
    """Write the records of a JSON array, or of a table with a header, to standard output, one a line.

    Raises:
        SystemExit: it is neither, or not whole; with the place.
    """
    try:
        with opened(Path(path)) as file:
            text = file.read().decode(encoding)
        start = text.lstrip()
        lines = _of_array(start) if start.startswith("[") else _of_table(text, delimiter)
    except (OSError, EOFError, ValueError, csv.Error, RecursionError) as error:
        raise SystemExit(f"{path}: {error}") from None
    sys.stdout.buffer.write("".join(f"{line}\n" for line in lines).encode())
    sys.stdout.flush()


def _of_array(text: str) -> list[str]:
    """Each record as it is written: `json` would round numbers, and keep the last of a key that stands twice."""
    decoder, end = json.JSONDecoder(), 1
    lines: list[str] = []
    while True:
        start = re.compile(r"\s*").match(text, end).end()  # type: ignore[union-attr]
        if text[start : start + 1] == "]" and not lines:
            break
        _, end = decoder.raw_decode(text, start)
        lines.append(re.sub(r"[\r\n]+", " ", text[start:end]))  # none is inside a text
        mark = re.compile(r"\s*([,\]]?)").match(text, end)
        assert mark is not None
        end = mark.end()
        if mark[1] == "]":
            start = end - 1
            break
        if not mark[1]:
            raise json.JSONDecodeError("no comma between two records", text, end)
    if text[start + 1 :].strip():
        raise json.JSONDecodeError("more behind the array's end", text, start + 1)
    return lines


def _of_table(text: str, delimiter: str) -> list[str]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(rows, [])
    lines: list[str] = []
    if len(set(header)) < len(header):
        raise ValueError("a name stands twice in the header")
    for row in rows:
        if row and len(row) != len(header):
            raise ValueError(f"line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
        lines += [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False)] if row else []
    return lines
