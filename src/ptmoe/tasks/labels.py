"""Classification over all examples together: how often each label was answered where each was right, and macro-F1.

    F1 of a label = 2 TP / (2 TP + FP + FN), 0 where it is neither right nor answered
    macro-F1      = the plain mean over all labels of the task

as `sklearn.metrics.f1_score(…, labels=labels, average="macro", zero_division=0)`. An answer that is no label is a false
negative of the right one, and of no label a false positive. Of a mixture, the plain mean over its parts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ptmoe.errors import PtmoeError
from ptmoe.tasks.metrics import answer_of
from ptmoe.tasks.resampling import RESAMPLES, SEED

Counts = NDArray[np.int64]
Answers = Sequence[tuple[str | None, Sequence[str]]]
"""Each example's answer, None where there is none, and its references, of which the first is a label."""


def confusion(labels: Sequence[str], answers: Answers) -> Counts:
    """`(K, K + 1)`, how many examples of a label (row) got each answer (column); the last is for all that is no label.

    Labels and answers are compared as they are, up to white space.

    Raises:
        PtmoeError: a reference that is no label.
    """
    place = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    for text, references in answers:
        if references[0] not in place:
            raise PtmoeError(f"the reference {references[0]!r} is none of the task's labels: {', '.join(labels)}")
        answer = " ".join(answer_of(text or "", references).split())
        counts[place[references[0]], place.get(answer, len(labels))] += 1
    return counts


def macro_f1(counts: Counts) -> NDArray[np.float64]:
    """In percent, from counts `(…, K, K + 1)`."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)  # (…, K)
    total = counts.sum(-1) + counts[..., :-1].sum(-2)  # 2 TP + FN + FP
    scores: NDArray[np.float64] = 100 * (2 * right / np.maximum(total, 1)).mean(-1)
    return scores


def mean_macro_f1(tables: Sequence[Counts]) -> float:
    """The mean over parts, one table of counts each."""
    return float(np.mean([macro_f1(counts) for counts in tables]))


def macro_f1_interval(tables: Sequence[Counts]) -> tuple[float, float]:
    """The 95 % percentile interval of `mean_macro_f1` over examples, each part's resampled among themselves."""
    generator = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for counts in tables:
        size, cells = int(counts.sum()), counts.reshape(-1)
        drawn = generator.multinomial(size, cells / size, size=RESAMPLES)  # how often each cell of the table comes
        means += macro_f1(drawn.reshape(-1, *counts.shape)) / len(tables)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
