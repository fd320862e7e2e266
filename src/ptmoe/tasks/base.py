"""What a task is, and what it gives: examples that are read, prompted and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptmoe.tasks.records import Format, Problems


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        id: unique within its task and split.
        input: the text that the model is given; a chat template may go around it.
        target: the completion that training supervises; `input + target` is the whole text.
        references: the answers that count as right.
        task: the task's name.
        domain: a part of the task that results are broken down by, or "".
        messages: for conversations, all but the answer; the tokenizer's chat template then makes the prompt and the
            completion from them, and `input` is only for people.
        context: the characters of `input`, from and to, that may be cut where the whole is too long; the rest, the
            question above all, never is.
        answer: the characters of `input`, within the context, that a training example is cut around.
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


@dataclass(frozen=True)
class Split:
    """A part of a data set, and where it may lie.

    Attributes:
        examples: as published; None where no number is fixed.
        files: the names that it may have in a data folder, in the order they are looked for.
        hub: its name in the Hub's copy; "" where that has none.
        url: of the released file, and its `md5`.
    """

    examples: int | None
    files: tuple[str, ...] = ()
    hub: str = ""
    url: str = ""
    md5: str = ""


@dataclass(frozen=True)
class Hub:
    """A data set's copy on the Hugging Face Hub.

    Attributes:
        repository: its name; `config` is the `datasets` configuration.
        example: from a row to an example, as in `Format`.
        where: a column and its value in the rows that are this task's; all by default.
        columns: those that `example` needs; all by default.
    """

    repository: str
    example: Callable[[dict[str, Any], Origin], Example]
    config: str | None = None
    where: tuple[str, str] | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where a record comes from: its task, its split, and its number there, from 0."""

    task: str
    split: str
    number: int

    @property
    def id(self) -> str:
        """For a data set that gives its records no name."""
        return f"{self.split}-{self.number}"


@dataclass(frozen=True)
class Task:
    """A named data set.

    Attributes:
        splits: by name; `test` is what papers report.
        grader: a key of `ptmoe.tasks.metrics.GRADERS`.
        metric: the one of the grader's metrics that ranks methods.
        max_new_tokens: enough for any right answer.
        until: an answer ends before the first of these texts, where the model does not end it itself.
        formats: the original formats that it is read from.
        chat: whether its prompts go into a tokenizer's chat template, where there is one.
        generate: instead of files, for a world that is generated.
        note: for people, in `ptmoe tasks`.
    """

    name: str
    splits: Mapping[str, Split]
    grader: str
    metric: str
    max_new_tokens: int
    licence: str
    source: str
    formats: tuple[Format, ...] = ()
    hub: Hub | None = None
    until: tuple[str, ...] = ()
    chat: bool = True
    generate: Callable[[str, str], Iterator[Example]] | None = None
    note: str = ""


def unique(examples: Iterable[tuple[str, Example]], problems: Problems) -> dict[str, Example]:
    """Examples by id, from each with the place it stands at; an id that comes again is noted in `problems`."""
    found: dict[str, Example] = {}
    places: dict[str, str] = {}
    for place, example in examples:
        if example.id in found:
            problems.add(place, f"id {example.id!r} was used before, at {places[example.id]}")
        else:
            found[example.id], places[example.id] = example, place
    return found
