"""Intervals and paired tests, on numpy alone, the same for the same numbers.

Resampling `n` examples with replacement draws how often each *distinct* value comes: one multinomial instead of `n`
picks. Likewise the signs of equal differences flip in one binomial. So ten thousand resamples of ten thousand examples
take a moment, and the examples' order cannot matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
MOST_DISTINCT = 1500

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Examples whose mean enters a figure with a weight: all of a task, or those of one of its domains."""

    weight: float
    values: Values


@dataclass(frozen=True)
class PairedTest:
    """Of two methods on the same examples.

    Attributes:
        difference: of the weighted means, first less second.
        interval: 95 %, percentiles of the bootstrap over examples, each group resampled by itself.
        p: two-sided, of the sign-flip permutation test: how often a difference at least as large comes about where each
            example's difference has either sign with equal chance.
    """

    difference: float
    interval: tuple[float, float]
    p: float


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean from Student's t, over at least two values, such as one for each seed."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} value(s): an interval over them needs at least 2")
    array = np.asarray(values, dtype=float)
    half = t_quantile(len(values) - 1) * float(array.std(ddof=1)) / math.sqrt(len(values))
    return float(array.mean()) - half, float(array.mean()) + half


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    low, high = 0.0, 13.0  # 12.7 with one degree
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, freedom: int) -> float:
    """The probability that |T| < t; a finite series for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def weighted_mean(groups: Sequence[Group]) -> float:
    """The sum of the groups' means, each times its weight."""
    return float(sum(group.weight * group.values.mean() for group in groups))


def bootstrap_interval(groups: Sequence[Group]) -> tuple[float, float]:
    """The 95 % percentile interval of `weighted_mean`, each group's examples resampled by themselves."""
    generator = np.random.default_rng(SEED)
    means = np.zeros(RESAMPLES)
    for group in groups:
        distinct, counts = _distinct(group.values)
        size = len(group.values)
        for part in _parts(len(distinct)):
            drawn = generator.multinomial(size, counts / size, size=part.stop - part.start)
            means[part] += group.weight * (drawn @ distinct) / size
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def paired_test(groups: Sequence[Group]) -> PairedTest:
    """Whether per-example differences, `values` of the groups, could be chance."""
    difference = weighted_mean(groups)
    generator = np.random.default_rng(SEED)
    flipped = np.zeros(RESAMPLES)
    for group in groups:
        sizes, counts = _distinct(np.abs(group.values))
        for part in _parts(len(sizes)):
            positive = generator.binomial(counts, 0.5, size=(part.stop - part.start, len(sizes)))
            flipped[part] += group.weight * ((2 * positive - counts) @ sizes) / len(group.values)
    # The tolerance counts sums that differ by rounding only; the 1 is the arrangement that was seen.
    as_large = int((np.abs(flipped) >= abs(difference) - 1e-9).sum())
    return PairedTest(difference, bootstrap_interval(groups), (1 + as_large) / (1 + RESAMPLES))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of any false finding among these p values stays at the level they are read at."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


def _distinct(values: Values) -> tuple[Values, NDArray[np.int64]]:
    """The distinct values and how often each stands; so many that drawing would take long are rounded to a thousandth
    first, which moves a mean over thousands of examples by nothing that is printed."""
    distinct, counts = np.unique(values, return_counts=True)
    return np.unique(values.round(3), return_counts=True) if len(distinct) > MOST_DISTINCT else (distinct, counts)


def _parts(width: int) -> list[slice]:
    """Slices of the resamples that keep a table of so many columns within some tens of megabytes."""
    step = max(1, 4_000_000 // max(1, width))
    return [slice(start, min(start + step, RESAMPLES)) for start in range(0, RESAMPLES, step)]
