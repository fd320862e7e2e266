"""The two prompt templates, a question about a passage and a mathematical problem, and what all such problems share."""

from functools import partial

from ptmoe.tasks.base import Example, Origin, Task
from ptmoe.tasks.equations import worked_solution


def question(text: str, context: str = "") -> tuple[str, tuple[int, int]]:
    """The prompt, and the span of the context in it.

    CONTEXT

    Question: TEXT
    Answer:
    """
    before = f"{context}\n\n" if context else ""
    return f"{before}Question: {text.strip()}\nAnswer:", (0, len(context))


def word_problem(
    origin: Origin, name: str, *sentences: str, answer: str, target: str = "", equation: object = "", domain: str = ""
) -> Example:
    """The example of a word problem; a sentence without a full stop gets one, to separate it from the next.

    Question: BODY. QUESTION
    Answer: #### ANSWER

    Args:
        name: its id.
        answer: its reference.
        target: a worked solution; by default the one that the equation makes, and without one the answer alone, in the
            form in which GSM8K's solutions end.
        equation: the record's own, if it has one, as text.
    """
    parts = [part.strip() for part in sentences if part.strip()]
    joined = " ".join(part if part[-1] in ".,;:!?" or part is parts[-1] else f"{part}." for part in parts)
    target = target or f" {worked_solution(str(equation), answer) or f'#### {answer}'}"
    return Example(name, question(joined)[0], target, (answer,), origin.task, domain)


WordProblems = partial(Task, grader="mathematics", metric="accuracy", max_new_tokens=512, until=("\nQuestion:",))
"""A `Task` of word problems."""
