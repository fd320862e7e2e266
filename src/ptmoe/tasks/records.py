"""A file's records as a stream, each with its location: JSON lines, a JSON array, CSV or TSV rows, XML elements, lines.

Memory does not grow with the file. Gzip is recognised by its first bytes. Whatever cannot be read is added to
`Problems` with its file and line, and the caller decides whether to refuse bad records (the default) or to skip them.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import IO, Any, AnyStr, TypeVar, cast
from xml.etree import ElementTree

from ptmoe.errors import PtmoeError
from ptmoe.tasks.problems import BadRecordError, Problems
from ptmoe.tasks.written import Decoder, once_each, twice

_HEAD = 1 << 16  # bytes from which a file's format is recognised
_CHUNK = 1 << 20
_LONGEST = 1 << 24  # bytes of a line or of a record in an array: more would be a file of another kind
_GZIP = b"\x1f\x8b"
_LONGEST_NUMBER = 300  # digits of a whole number that is written out
_SEPARATOR = re.compile(r"\s*([,\]]?)\s*")  # between two records of a JSON array, or at its end
_TOO_LONG = f"longer than {_LONGEST >> 20} MB"
DAMAGED = (EOFError, OSError, zlib.error)  # what `gzip` raises

Record = tuple[str, Any]  # its location, "FILE:LINE", and its contents
T = TypeVar("T")


def unique(records: Iterable[tuple[str, str, T]], problems: Problems) -> dict[str, T]:
    """Values by id, from triples of location, id and value; repeated ids are added to `problems`."""
    found: dict[str, T] = {}
    places: dict[str, str] = {}
    for place, name, value in records:
        if name in found:
            problems.add(place, f"id {name!r} was used before, at {places[name]}")
        else:
            found[name], places[name] = value, place
    return found


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unzipped if necessary."""
    with path.open("rb") as file:
        zipped = file.peek(2)[:2] == _GZIP
        yield cast(IO[bytes], gzip.GzipFile(fileobj=file)) if zipped else file


def head(path: Path) -> tuple[str, frozenset[str]]:
    """What the beginning of a file reveals.

    Returns:
        its kind: `"{"` for JSON lines or a JSON object, `"["` for a JSON array, `"<"` for XML, `"\t"` where the first
        line has a tab, `","` for anything else, `""` for a damaged gzip; and the keys of its first JSON object, its
        header, or its XML root element's name.

    Raises:
        PtmoeError: an empty file.
    """
    start = head_bytes(path)
    if start is None:
        return "", frozenset()
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise PtmoeError(f"{path} is empty: needs at least one record")
    if text[0] in "{[":
        return text[0], frozenset(_first_keys(text))
    if text[0] == "<":
        return "<", frozenset(re.findall(r"<([A-Za-z_][\w.-]*)", text)[:1])
    first = text.splitlines()[0]
    if "\t" in first:
        return "\t", frozenset(first.split("\t"))
    return ",", frozenset(next(csv.reader([first]), []))


def head_bytes(path: Path) -> bytes | None:
    """The beginning of a file, unzipped if necessary; None for a damaged gzip."""
    try:
        with opened(path) as file:
            return file.read(_HEAD)
    except DAMAGED:
        return None


def whole_text(path: Path, most: int | None = None) -> str:
    """The text of a file that is small, unzipped if necessary.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, is a damaged gzip, or no text.
        PtmoeError: it has more than so many bytes.
    """
    try:
        with opened(path) as file:
            found = file.read(-1 if most is None else most + 1)
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged gzip ({error})") from None
    if most is not None and len(found) > most:
        raise PtmoeError(f"{path} is one object of more than {most:,} bytes: needs JSON lines, an id and a text each")
    return found.decode("utf-8-sig")


def _first_keys(text: str) -> Iterator[str]:
    """The keys of the first JSON object in a text that may be truncated."""
    depth, last = 0, ""
    for token in re.finditer(r'"((?:[^"\\]|\\.)*)"|[{}\[\]:]', text[1:] if text[0] == "[" else text):
        if token[1] is not None:
            last = token[1]
        elif token[0] == ":":
            if depth == 1:
                yield last
        else:
            depth += 1 if token[0] in "{[" else -1
            if depth == 0:
                return


def _short_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise BadRecordError(_TOO_LONG)
        yield line


@dataclass
class _Reading:
    """A file that is being read, and the line that has been reached."""

    path: Path
    file: IO[bytes]
    line: int = 1

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    def __iter__(self) -> Iterator[bytes]:
        for line in _short_lines(self.file):
            yield line
            self.line += 1


@contextmanager
def _reading(path: Path, problems: Problems) -> Iterator[_Reading]:
    """A file to read; damage that ends the reading early is added to `problems` at the line that has been reached."""
    with opened(path) as file:
        reading = _Reading(path, file)
        try:
            yield reading
            return
        except UnicodeDecodeError:
            damage = "not UTF-8 text at or after this line"
        except DAMAGED as error:
            damage = f"damaged gzip ({error})"
        except BadRecordError as error:
            damage = str(error)
        problems.add(reading.place, f"{damage}: nothing from here on can be read")


def json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    """Each line's object."""
    decoder = Decoder()
    with _reading(path, problems) as reading:
        for line in reading:
            if line.strip():
                with problems.at(reading.place):
                    yield reading.place, object_of(_parsed(decoder, line.rstrip().removeprefix(b"\xef\xbb\xbf")))


def _parsed(decoder: Decoder, line: bytes) -> Any:
    try:
        return decoder.decode(line.decode())
    except BadRecordError:
        raise
    except UnicodeDecodeError:
        raise BadRecordError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise BadRecordError("not JSON that can be read (nested too deep)") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise BadRecordError(f"not JSON that can be read ({error})") from None


def json_array(path: Path, problems: Problems, *, key: str | None = None) -> Iterator[Record]:
    """Each object of a JSON array: the file's own, or the one under `key` in an object.

    (`ijson` streams JSON as well, but does not know the line, and drops the records of a chunk before damage in it.)
    """
    before = re.compile((r"\s*" if key is None else rf'.*?"{key}"\s*:\s*') + r"(\[\s*\]?)\s*", re.DOTALL)
    decoder = Decoder()
    with _reading(path, problems) as reading:
        file = io.TextIOWrapper(reading.file, encoding="utf-8-sig")
        text, start = "", 0  # a part of the file, and where the next record in it starts, or the comma before
        while True:
            damage, where, end = "", start, len(text)
            mark = before.match(text, start)
            try:
                if mark is None:
                    damage = "not a JSON array" if key is None else f"no array under {key!r}"
                elif mark[1].endswith("]"):
                    text, end = text + file.read(_CHUNK), 0
                    if key is not None or not text[mark.end() :].strip():
                        return
                    damage, where = "more behind the array's end", mark.end()
                elif not mark[1]:
                    raise json.JSONDecodeError("no comma between two records", text, mark.end())
                else:
                    record, end = decoder.raw_decode(text, mark.end())
            except json.JSONDecodeError as error:
                where = error.pos
                damage = f"not JSON ({'the array is truncated' if where == end else error.msg})"
            except RecursionError:
                damage = "not JSON that can be read (nested too deep)"
            except ValueError as error:
                damage = f"not JSON that can be read ({error})"
            if end == len(text) and end - start >= _LONGEST:
                raise BadRecordError(f"a record {_TOO_LONG}")
            if end == len(text) and (more := file.read(max(_CHUNK, end - start))):
                text, start = text[start:] + more, 0  # a longer part may hold what is missing
                continue
            if damage or mark is None:
                reading.line += text.count("\n", start, where)
                raise BadRecordError(damage)
            place = f"{path}:{reading.line + text.count(chr(10), start, mark.end())}"
            with problems.at(place):
                yield place, object_of(decoder.checked(record))
            reading.line += text.count("\n", start, end)
            start, before = end, _SEPARATOR


def xml_elements(path: Path, problems: Problems, *, name: str) -> Iterator[Record]:
    """Each element with this name, as its attributes and its children's texts."""
    parser: Any = ElementTree.XMLPullParser(events=("start", "end"))
    ancestors: list[ElementTree.Element] = []
    place = ""
    with _reading(path, problems) as reading:
        try:
            for line in reading:
                parser.feed(line)
                for event, element in parser.read_events():
                    if event == "start":
                        ancestors.append(element)
                        place = reading.place if element.tag == name else place
                        continue
                    ancestors.pop()
                    if element.tag == name:
                        texts = ((child.tag, "".join(child.itertext()).strip()) for child in element)
                        with problems.at(place):
                            yield place, once_each([*element.attrib.items(), *texts])
                        if ancestors:  # otherwise the tree would keep every element
                            ancestors[-1].remove(element)
            parser.close()
        except ElementTree.ParseError as error:
            reading.line = error.position[0]
            raise BadRecordError(f"not XML ({str(error).split(':')[0]})") from None


def csv_rows(path: Path, problems: Problems, *, columns: Sequence[str] = (), tabs: bool = False) -> Iterator[Record]:
    """Each row as a dict with the header's names as keys.

    Args:
        columns: of a file that may lack the header.
        tabs: between fields, and a quotation mark is one.
    """
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    with _reading(path, problems) as reading:
        file = io.TextIOWrapper(reading.file, encoding="utf-8-sig", newline="")
        rows = csv.reader(_short_lines(file), strict=True, **dialect)
        header = list(columns)
        while True:
            reading.line = rows.line_num + 1
            place = reading.place
            try:
                row = next(rows, None)
            except csv.Error as error:
                lost = f": all from here to line {rows.line_num} is lost" if rows.line_num > reading.line else ""
                problems.add(place, f"not CSV ({error}){lost}")
                row = []
            if row is None:
                return
            if not header:
                header = row
                if names := twice(filter(None, row)):
                    raise BadRecordError(f"the header has {names[0]!r} twice")
            elif columns and row == header:
                continue
            elif len(row) == len(header):
                yield place, dict(zip(header, row, strict=True))
            elif row:
                problems.add(place, f"{len(row)} fields, the header has {len(header)}")


def text_lines(path: Path, problems: Problems, *, encoding: str) -> Iterator[Record]:
    """Each line that is not empty, as `{"line": …}`: of the data set's own encoding, or of a copy in UTF-8."""
    with _reading(path, problems) as reading:
        for line in reading:
            try:
                text = line.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                text = line.decode(encoding).strip()
            if text:
                yield reading.place, {"line": text}


Reader = Callable[[Path, Problems], Iterator[Record]]
# By kind, as `head` returns it.
READERS: dict[str, Reader] = {
    "{": json_lines,
    "[": json_array,
    ",": csv_rows,
    "\t": partial(csv_rows, tabs=True),
}


def object_of(value: Any) -> dict[str, Any]:
    """A record that has to be a JSON object.

    Raises:
        BadRecordError: it is something else.
    """
    if not isinstance(value, dict):
        raise BadRecordError(f"a JSON {type(value).__name__}, needs an object")
    return value


def has(record: dict[str, Any]) -> str:
    """A record's keys, for messages."""
    return f"(has {', '.join(map(repr, record)) or 'none'})"


def text_of(record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """A field's text; a number is turned into text.

    Raises:
        BadRecordError: it is missing, empty, or neither text nor a finite number.
    """
    if key not in record:
        raise BadRecordError(f"lacks the key {key!r} {has(record)}")
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if str(value) in ("nan", "inf", "-inf"):
            raise BadRecordError(f"{key!r} is {value}, needs text")
        return number_text(value)
    if not isinstance(value, str):
        raise BadRecordError(f"{key!r} is {type(value).__name__}, needs text")
    if not value.strip() and not may_be_empty:
        raise BadRecordError(f"{key!r} is empty")
    return value


def name_of(record: dict[str, Any], key: str, default: str) -> str:
    """An id or a domain. What an export writes where there is none (null, NaN, an empty text) counts as not given.

    Raises:
        BadRecordError: it is neither text nor a number.
    """
    value = record.get(key)
    if value is None or value == "" or value != value:
        return default
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise BadRecordError(f"{key!r} is {type(value).__name__}, needs text or a number")
    return str(value)


def number_text(value: float | str) -> str:
    """A number as people write it, `51.0` as `51`; every digit as it was written."""
    text = str(value).strip()
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    short = number.is_finite() and number.adjusted() < _LONGEST_NUMBER
    return str(int(number)) if short and number == number.to_integral_value() else text


def check_unicode(text: str) -> str:
    """The text, which may not hold half of a character: legal in JSON, but no tokenizer takes it.

    Raises:
        BadRecordError: it holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        typed = ", or a byte that is not UTF-8" if "\udc80" <= half <= "\udcff" else ""  # as Python reads one
        raise BadRecordError(
            f"not Unicode text: {ascii(half)[1:-1]} is half of a character (a lone surrogate){typed}"
        ) from None
    return text
