"""What a task is: examples that are read, prompted and scored."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    Attributes:
        id: unique within its task and split.
        input: the text that the model is given, as it is.
        target: the completion that training supervises; `input + target` is the whole text.
        references: the answers that count as right.
        task: the task's name.
        domain: a part of the task that results are broken down by, or "".
        messages: for conversations, all but the answer; the tokenizer's chat template then makes the prompt and the
            completion from them, and `input` is only for people.
    """

    id: str
    input: str
    target: str
    references: tuple[str, ...]
    task: str
    domain: str = ""
    messages: tuple[dict[str, Any], ...] = field(default=())
