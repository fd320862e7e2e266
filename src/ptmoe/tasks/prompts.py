"""The two prompt templates: a question about a passage, and a mathematical problem."""

from __future__ import annotations


def question(text: str, context: str = "") -> tuple[str, tuple[int, int]]:
    """The prompt, and the span of the context in it.

    CONTEXT

    Question: TEXT
    Answer:
    """
    before = f"{context}\n\n" if context else ""
    return f"{before}Question: {text.strip()}\nAnswer:", (0, len(context))


def problem(*sentences: str) -> str:
    """A word problem; a sentence without a full stop gets one, so that it is separated from the next.

    Question: BODY. QUESTION
    Answer:
    """
    parts = [part.strip() for part in sentences if part.strip()]
    joined = " ".join(part if part[-1] in ".,;:!?" or part is parts[-1] else f"{part}." for part in parts)
    return question(joined)[0]


def solution(answer: str) -> str:
    """A completion that is only the answer, in the form in which GSM8K's solutions end: `#### n`."""
    return f" #### {answer}"
