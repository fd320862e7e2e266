"""The two templates: a question on a passage, and a problem in mathematics."""

from __future__ import annotations


def question(text: str, context: str = "") -> tuple[str, tuple[int, int]]:
    """The prompt, and where in it the context stands.

    CONTEXT

    Question: TEXT
    Answer:
    """
    before = f"{context}\n\n" if context else ""
    return f"{before}Question: {text.strip()}\nAnswer:", (0, len(context))


def problem(*sentences: str) -> str:
    """A problem in words; a sentence that lacks its full stop gets one, so that the next can be told from it.

    Question: BODY. QUESTION
    Answer:
    """
    parts = [part.strip() for part in sentences if part.strip()]
    joined = " ".join(part if part[-1] in ".,;:!?" or part is parts[-1] else f"{part}." for part in parts)
    return question(joined)[0]


def solution(answer: str) -> str:
    """A completion that gives the answer alone, closed as GSM8K closes its own: `#### n`."""
    return f" #### {answer}"
