"""What a task is, and what it yields: examples that are read, prompted and scored."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.tasks.problems import Problems
from ptmoe.tasks.records import Reader, check_unicode, unique

_SEED = "0"  # of the choice of the examples that are held out


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        id: unique within its task and split.
        input: the text that the model reads; a chat template may wrap it.
        target: the completion that training supervises; `input + target` is the whole text.
        references: the answers that count as correct.
        task: the task's name.
        domain: the part of the task by which results are broken down, or "".
        messages: for conversations, all messages before the answer; the tokenizer's chat template makes prompt and
            completion from them, and `input` is only for display.
        reply: what the answer's message holds besides its role and its content: `reasoning_content`, `tool_calls`, …
        template: what else the chat template is given: `tools`, `documents`, `chat_template_kwargs`.
        context: the span `(start, end)` of characters in `input` that may be cut if the example is too long; the rest,
            above all the question, is never cut.
        answer: the span of the answer within the context: a training example is cut around it.
        place: where it was read, `FILE:LINE`, for messages; "" if it was not read from a file.
    """

    id: str
    input: str
    target: str
    references: tuple[str, ...]
    task: str
    domain: str = ""
    messages: tuple[dict[str, Any], ...] = field(default=())
    context: tuple[int, int] = (0, 0)
    answer: tuple[int, int] | None = None
    reply: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return self.place or f"example {self.id}"

    @property
    def contents(self) -> tuple[Any, ...]:
        """Everything that decides its tokens."""
        return self.input, self.target, self.messages, self.reply, self.template, self.context, self.answer

    def read_at(self, place: str) -> Self:
        """The example with the place where it was read.

        Raises:
            BadRecordError: it holds half of a character, which no tokenizer takes.
        """
        check_unicode(f"{self.id}{self.domain}{json.dumps((self.contents, self.references), ensure_ascii=False)}")
        return replace(self, place=place)


@dataclass(frozen=True)
class Origin:
    """Where a record comes from: its task, its split, and its index there."""

    task: str
    split: str
    number: int

    @property
    def id(self) -> str:
        """The id of a record whose data set has no ids."""
        return f"{self.split}-{self.number}"


@dataclass(frozen=True)
class Format:
    """An original file format of a data set.

    Attributes:
        name: for messages, "GSM8K's JSON lines".
        kinds: `"{"` for JSON lines, `"["` for a JSON array, `"{["` for both, `","` for CSV or plain lines, `"\t"` for
            TSV, `"<"` for XML.
        keys: alternatives such as `("question answer", "problem solution")`: a file is recognised by having all keys of
            one of them in its first record, its CSV header, or as its XML root. None for a file without a header,
            which is taken for this format if it looks like no other.
        example: makes an example from a record; raises `BadRecordError`.
        reader: yields a file's records; by default the kind's own in `ptmoe.tasks.records.READERS`.
        first: how many of its records are the task's; by default all.
    """

    name: str
    kinds: str
    keys: tuple[str, ...]
    example: Callable[[dict[str, Any], Origin], Example]
    reader: Reader | None = None
    first: int | None = None

    def recognises(self, kind: str, keys: frozenset[str]) -> bool:
        return kind in self.kinds and any(keys.issuperset(alternative.split()) for alternative in self.keys)


@dataclass(frozen=True)
class Split:
    """A part of a data set, and where it is found.

    Attributes:
        examples: as published; None where the number is not fixed.
        files: its possible names in a data folder, in the order in which they are tried.
        hub: the split's name in the Hub's copy, or "".
        url: of the released file.
        md5: of the released file.
        held_out: where one file is both training and validation data: whether the examples are those that are held out
            of training, or the others (`is_held_out`); None where all of the file is the split.
    """

    examples: int | None
    files: tuple[str, ...] = ()
    hub: str = ""
    url: str = ""
    md5: str = ""
    held_out: bool | None = None


def is_held_out(text: str) -> bool:
    """Whether an example with this input is among the tenth that is held out of training, the same everywhere. Equal
    inputs, up to case and white space, are on the same side."""
    return crc32(f"{_SEED} {folded(text)}".encode(errors="surrogatepass")) % 10 == 0


def folded(text: str) -> str:
    """What two texts have in common that differ in case and white space only."""
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class Hub:
    """A data set's copy on the Hugging Face Hub.

    Attributes:
        repository: its name.
        example: makes an example from a row, as in `Format`.
        config: the configuration of the data set in `datasets`.
        where: a column and the value that marks this task's rows; by default all rows are the task's.
        columns: the columns that `example` needs; by default all.
    """

    repository: str
    example: Callable[[dict[str, Any], Origin], Example]
    config: str | None = None
    where: tuple[str, str] | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named data set.

    Attributes:
        name: its key in `ptmoe.tasks.TASKS`.
        splits: by name; papers report `test`.
        grader: a key of `ptmoe.tasks.metrics.GRADERS`.
        metric: the metric of the grader that ranks methods.
        max_new_tokens: enough for any correct answer.
        licence: of the data.
        source: where the data is from.
        formats: the original file formats that can be read.
        hub: its copy on the Hub, if it has one.
        until: stop sequences: an answer ends before the first of them.
        chat: whether prompts are put in the tokenizer's chat template, where there is one.
        generate: for a generated world, what yields its examples; no files are read.
        labels: of a classification, the words of which one is the answer; it has a macro-F1, and can be scored by
            their likelihoods.
        parts: the tasks that it mixes, each a domain; no files of its own are read.
        disjoint: leave out of `train` and `validation` the inputs that stand in a later split, in this order, of this
            task or of another such task that it is mixed with, also where a run is evaluated on another folder.
        note: shown by `ptmoe tasks`.
        file: whose examples it grades, of no named data set.
    """

    name: str
    splits: Mapping[str, Split]
    grader: str
    metric: str
    max_new_tokens: int
    licence: str = ""
    source: str = ""
    formats: tuple[Format, ...] = ()
    hub: Hub | None = None
    until: tuple[str, ...] = ()
    chat: bool = True
    generate: Callable[[str, str], Iterator[Example]] | None = None
    labels: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    disjoint: bool = False
    note: str = ""
    file: str | None = None


def collect(examples: Iterable[tuple[str, Example]], problems: Problems, source: str) -> list[Example]:
    """All examples of a stream of locations and examples.

    Raises:
        PtmoeError: ids that repeat, other bad records, or no example at all.
    """
    collected = unique(((place, example.id, example) for place, example in examples), problems)
    problems.refuse()
    if not collected:
        bad = f"; {problems.listed()}" if problems.count else ""
        raise PtmoeError(f"{source} holds no example: needs at least one{bad}")
    return list(collected.values())
