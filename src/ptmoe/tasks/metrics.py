r"""How an answer is graded: as `verbatim` text, as `qa`, or as `mathematics`.

Question answering: `exact_match` and `f1`, as SQuAD's `evaluate-v1.1.py` (https://rajpurkar.github.io/SQuAD-explorer/)
and MRQA's `mrqa_official_eval.py` (https://github.com/mrqa/MRQA-Shared-Task-2019) define them. The two score every
answer alike; they differ only in the files they read and in that MRQA's can skip unanswered questions. Both fail where
there is no reference; here that scores 0. `torchmetrics.text.SQuAD` 1.9 agrees except for answers that normalise to
nothing: ("the", "a") has an F1 of 1 there, as in SQuAD 2.0, and of 0 in v1.1. It also needs tensors and 110 µs an
answer, ten times the time of this module.

Mathematics: `correct`, by value (`ptmoe.tasks.mathematics`).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ptmoe.tasks.mathematics import correct, extract_answer

__all__ = ["GRADERS", "correct", "exact_match", "extract_answer", "f1", "normalize_answer", "verbatim"]

# ---- verbatim --------------------------------------------------------------------------------------------------------


def verbatim(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction is one of the references, up to white space."""
    folded = " ".join(prediction.split())
    return any(folded == " ".join(reference.split()) for reference in references)


# ---- question answering ----------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only: “ and – are kept, as in the evaluators
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """In this order: lower case, punctuation removed, articles removed, white space collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """SQuAD's EM: whether the normalised prediction is one of the normalised references; `""` matches `""`."""
    normalized = normalize_answer(prediction)
    return any(normalized == normalize_answer(reference) for reference in references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 in 0..1: of the two bags of normalised tokens, for the best reference; 0 if either bag is empty."""
    predicted = normalize_answer(prediction).split()
    best = 0.0
    for reference in references:
        wanted = normalize_answer(reference).split()
        common = (Counter(predicted) & Counter(wanted)).total()
        if common:
            precision, recall = common / len(predicted), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


# ---- reasoning -------------------------------------------------------------------------------------------------------

END_OF_REASONING = "</think>"  # as Qwen3, GLM and DeepSeek-R1 write it before an answer, even an empty one


def answer_of(text: str, references: Sequence[str]) -> str:
    """What a completion says behind its reasoning, which is not graded unless a reference holds it, too."""
    if any(END_OF_REASONING in reference for reference in references):
        return text
    return text.rpartition(END_OF_REASONING)[2]


# ---- by name ---------------------------------------------------------------------------------------------------------

GRADERS: dict[str, Callable[[str, Sequence[str]], dict[str, float]]] = {
    "verbatim": lambda prediction, references: {"accuracy": float(verbatim(prediction, references))},
    "qa": lambda prediction, references: {
        "exact_match": float(exact_match(prediction, references)),
        "f1": f1(prediction, references),
    },
    "mathematics": lambda prediction, references: {"accuracy": float(correct(prediction, references))},
}
"""The scores of one answer, each in 0..1, by the name of the grader."""


def mark(grader: str, text: str, references: Sequence[str]) -> dict[str, float]:
    """The scores of a completion, each in 0..1."""
    return GRADERS[grader](answer_of(text, references), references)


MACRO_F1 = "macro_f1"
"""Of classifications besides: a metric of all answers together (`ptmoe.tasks.labels`), not a mean of theirs."""
