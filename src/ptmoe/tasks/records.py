"""A file's records as a stream, each with its location: JSON lines, a JSON array, XML elements, CSV rows.

Memory does not grow with the file. Gzip is recognised by its first bytes. Whatever cannot be read is added to
`Problems` with its file and line, and the caller decides whether to refuse bad records (the default) or to skip them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from xml.etree import ElementTree

from ptmoe.errors import PtmoeError

if TYPE_CHECKING:
    from ptmoe.tasks.base import Example, Origin

SHOWN = 5  # bad records that a message names; all are counted
_HEAD = 1 << 16  # bytes from which a file's format is recognised
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"

Record = tuple[str, Any]  # its location, "FILE:LINE", and its contents


class BadRecordError(ValueError):
    """What is wrong with a record; the reader adds its location."""


class Problems:
    """The bad records met while reading.

    Args:
        skip: count and list them; otherwise `refuse` raises.
        at_once: raise at the first, for a stream that is used before its end is read.
    """

    def __init__(self, *, skip: bool = False, at_once: bool = False) -> None:
        self.skip = skip
        self.at_once = at_once
        self.count = 0
        self.first: list[str] = []

    def add(self, place: str, what: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {what}")
        if self.at_once:
            self.refuse()

    def listed(self) -> str:
        """How many there are, and the first of them."""
        more = f"\n  … and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{self.count} bad record(s):\n  " + "\n  ".join(self.first) + more

    def refuse(self) -> None:
        """
        Raises:
            PtmoeError: there are bad records, and they are not skipped.
        """
        if self.count and not self.skip:
            raise PtmoeError(f"{self.listed()}\nfix or remove them, or skip them with --skip-bad")


@dataclass(frozen=True)
class Head:
    """What the beginning of a file reveals.

    Attributes:
        kind: `"{"` for JSON lines or a JSON object, `"["` for a JSON array, `"<"` for XML, `","` for anything else.
        keys: of the first JSON object or the CSV header; for XML the root element's name.
    """

    kind: str
    keys: frozenset[str]


@dataclass(frozen=True)
class Format:
    """An original file format of a data set.

    Attributes:
        name: for messages, "GSM8K's JSON lines".
        kind: of `Head`.
        recognise: whether a file with these keys is in this format.
        records: yields a file's records.
        example: makes an example from a record; raises `BadRecordError`.
    """

    name: str
    kind: str
    recognise: Callable[[frozenset[str]], bool]
    records: Callable[[Path, Problems], Iterator[Record]]
    example: Callable[[dict[str, Any], Origin], Example]


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unzipped if necessary."""
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP
    return gzip.open(path) if zipped else path.open("rb")  # type: ignore[return-value]


def head(path: Path) -> Head:
    """What the beginning of a file reveals.

    Raises:
        PtmoeError: an empty file.
    """
    try:
        with opened(path) as file:
            start = file.read(_HEAD)
    except (OSError, EOFError, zlib.error):
        return Head("", frozenset())  # a damaged gzip: reading reports where
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if not text:
        raise PtmoeError(f"{path} is empty: needs at least one record")
    if text[0] in "{[":
        return Head(text[0], frozenset(_first_keys(text)))
    if text[0] == "<":
        root = re.search(r"<([A-Za-z_][\w.-]*)", text)
        return Head("<", frozenset([root[1]] if root else []))
    return Head(",", frozenset(next(csv.reader([text.splitlines()[0]]), [])))


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


def json_lines(path: Path, problems: Problems) -> Iterator[Record]:
    """Each line's object."""
    number = 0
    with opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", _object(line.rstrip().removeprefix(b"\xef\xbb\xbf"))
                    except BadRecordError as problem:
                        problems.add(f"{path}:{number}", str(problem))
        except (EOFError, OSError, zlib.error) as error:
            problems.add(f"{path}:{number + 1}", _damaged_gzip(error))


def _object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise BadRecordError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise BadRecordError("not JSON that can be read (nested too deep)") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON {type(record).__name__}, needs an object")
    return record


def _damaged_gzip(error: Exception) -> str:
    return f"damaged gzip ({error}): nothing from here on can be read"


class _Text:
    """A buffer over a text file: it is extended on demand, and counts the lines that leave it."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.file = io.TextIOWrapper(file, encoding="utf-8-sig")
        self.buffer = ""
        self.line = 1
        self.ended = False

    def more(self) -> bool:
        """Double the buffer; False at the end of the file."""
        read = self.file.read(max(_CHUNK, len(self.buffer)))
        self.buffer += read
        self.ended = not read
        return not self.ended

    def drop(self, length: int) -> None:
        self.line += self.buffer.count("\n", 0, length)
        self.buffer = self.buffer[length:]

    def drop_through(self, pattern: str) -> bool:
        """Drop everything up to the end of the first match; False if there is none."""
        while (found := re.search(pattern, self.buffer)) is None:
            if not self.more():
                return False
        self.drop(found.end())
        return True

    def peek(self) -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        while not (stripped := self.buffer.lstrip()):
            self.drop(len(self.buffer))
            if not self.more():
                return ""
        self.drop(len(self.buffer) - len(stripped))
        return stripped[0]


def json_array(path: Path, problems: Problems, *, key: str | None = None) -> Iterator[Record]:
    """Each object of a JSON array: the file's own, or the one under `key` in an object.

    (`ijson` streams JSON as well, but does not know the line number.)
    """
    with opened(path) as file:
        text = _Text(path, file)
        try:
            if not text.drop_through(r"^\s*\[" if key is None else rf'"{key}"\s*:\s*\['):
                problems.add(f"{path}:1", "not a JSON array" if key is None else f"no array under {key!r}")
                return
            yield from _elements(text, problems)
        except UnicodeDecodeError:
            problems.add(
                f"{path}:{text.line}", "not UTF-8 text at or after this line: nothing from here on can be read"
            )
        except (EOFError, OSError, zlib.error) as error:
            problems.add(f"{path}:{text.line}", _damaged_gzip(error))


def _elements(text: _Text, problems: Problems) -> Iterator[Record]:
    decoder = json.JSONDecoder()
    first = True
    while (character := text.peek()) != "]":
        if not first and character == ",":
            text.drop(1)
            text.peek()
        elif not first or not character:
            return problems.add(
                f"{text.path}:{text.line}",
                "not JSON (the array is truncated)" if not character else "not JSON (no comma between two records)",
            )
        first = False
        while True:
            try:
                record, end = decoder.raw_decode(text.buffer)
                if isinstance(record, dict) or end < len(text.buffer):
                    break
            except (json.JSONDecodeError, RecursionError) as error:
                if not text.ended and text.more():
                    continue
                return problems.add(
                    _place(text, error),
                    f"not JSON ({getattr(error, 'msg', 'nested too deep')}): nothing from here on can be read",
                )
            if not text.more():
                break
        place = f"{text.path}:{text.line}"
        text.drop(end)
        if isinstance(record, dict):
            yield place, record
        else:
            problems.add(place, f"a JSON {type(record).__name__}, needs an object")
    return None


def _place(text: _Text, error: Exception) -> str:
    return f"{text.path}:{text.line + text.buffer.count(chr(10), 0, getattr(error, 'pos', 0))}"


def xml_elements(path: Path, problems: Problems, *, name: str) -> Iterator[Record]:
    """Each element with this name, as its attributes and its children's texts."""
    parser: Any = ElementTree.XMLPullParser(events=("start", "end"))
    around: list[ElementTree.Element] = []
    started = number = 0
    with opened(path) as file:
        try:
            for number, line in enumerate(file, 1):
                parser.feed(line)
                for event, element in parser.read_events():
                    if event == "start":
                        around.append(element)
                        started = number if element.tag == name else started
                        continue
                    around.pop()
                    if element.tag == name:
                        children = {child.tag: "".join(child.itertext()).strip() for child in element}
                        yield f"{path}:{started}", {**element.attrib, **children}
                        if around:  # otherwise the tree would keep every element
                            around[-1].remove(element)
            parser.close()
        except ElementTree.ParseError as error:
            problems.add(
                f"{path}:{error.position[0]}", f"not XML ({str(error).split(':')[0]}): nothing from here on can be read"
            )
        except (EOFError, OSError, zlib.error) as error:
            problems.add(f"{path}:{number + 1}", _damaged_gzip(error))


def csv_rows(path: Path, problems: Problems) -> Iterator[Record]:
    """Each row as a dict with the header's names as keys."""
    with opened(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        before = 0
        header: list[str] | None = None
        while True:
            try:
                row = next(reader, None)
            except UnicodeDecodeError:
                return problems.add(f"{path}:{reader.line_num + 1}", "not UTF-8 text at or after this line")
            except (EOFError, OSError, zlib.error) as error:
                return problems.add(f"{path}:{reader.line_num + 1}", _damaged_gzip(error))
            except csv.Error as error:
                problems.add(f"{path}:{before + 1}", f"not CSV ({error})")
                before = reader.line_num
                continue
            if row is None:
                return None
            place, before = f"{path}:{before + 1}", reader.line_num
            if header is None:
                header = row
            elif len(row) == len(header):
                yield place, dict(zip(header, row, strict=True))
            elif row:
                problems.add(place, f"{len(row)} fields, the header has {len(header)}")


def text_of(record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """A field's text; a number is turned into text.

    Raises:
        BadRecordError: it is missing, empty, or neither text nor a number.
    """
    if key not in record:
        raise BadRecordError(f"lacks the key {key!r} (has {', '.join(map(repr, record)) or 'none'})")
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(value)
    if not isinstance(value, str):
        raise BadRecordError(f"{key!r} is {type(value).__name__}, needs text")
    if not value.strip() and not may_be_empty:
        raise BadRecordError(f"{key!r} is empty")
    return value


def number_text(value: float | str) -> str:
    """A number as people write it: `51.0` as `51`."""
    try:
        number = float(value)
    except ValueError:
        return str(value).strip()
    return str(int(number)) if number.is_integer() else str(value).strip()
