"""What a request, and all of them together, may take: options of `ptmoe serve`."""

from typing import Annotated

from pydantic import Field

from ptmoe.settings import Settings

Count = Annotated[int, Field(ge=1)]


class Limits(Settings):
    """
    Attributes:
        max_tokens: new tokens of an answer at most.
        max_choices: answers to one request at most (prompts × n).
        max_batch: answers generated at once.
        queue: answers that wait at most; more are refused with status 429.
        deadline: seconds that a request may take.
        max_body: bytes of a request at most.
    """

    max_tokens: Count = 4096
    max_choices: Count = 16
    max_batch: Count = 32
    queue: Annotated[int, Field(ge=0)] = 256
    deadline: Annotated[float, Field(gt=0, le=86400)] = 300.0
    max_body: Count = 1_000_000
