"""Trainable parameters as a budget: `80k` picks each method's free size for a base, from the base's config alone.

pt on Llama-3.2-1B, H = 2048, 80k     39 tokens    79,872 (40 would be 81,920)
pt-moe, T = 40, N = 2                 rank 35      78,578 (36 would be 80,706)
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from annotated_types import Ge

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import MethodConfig
from ptmoe.models import attach
from ptmoe.models.bases import max_positions


def sizes_of(config: MethodConfig) -> dict[str, int]:
    """The fields of type `ptmoe.methods.base.Size`, which make up what tables call a method's size."""
    fields = type(config).model_fields.items()
    return {
        name: getattr(config, name) for name, field in fields if field.annotation is int and Ge(1) in field.metadata
    }


def size_text(config: MethodConfig) -> str:
    """`num_virtual_tokens=40, rank=36`, or a dash for a method without a size."""
    return ", ".join(f"{name}={value}" for name, value in sizes_of(config).items()) or "–"


def fit_budget(
    base_config: Any, config_class: type[MethodConfig], budget: int, fixed: Mapping[str, Any] | None = None
) -> MethodConfig:
    """The config whose trainable parameters come closest to a budget without exceeding it.

    Args:
        base_config: a `transformers` config; no weights are needed.
        config_class: of any method.
        budget: trainable parameters, at least 1.
        fixed: fields that are given; the free sizes among them keep their values.

    Returns:
        A checked config: the method's first free size (`MethodConfig.free_sizes`) as large as the budget and the base
        allow. Where even 1, or the least that the given fields take, is too much, the next free size is lowered, and
        what is left goes to the first again. A prompt has at most half the base's positions.

    Raises:
        PtmoeError: the smallest size exceeds the budget, or a given field does not fit the method or the base.
    """
    given = dict(fixed or {})
    checked = config_class(**given)  # report a misspelt field as such
    numbers = {number for name in given if type(number := getattr(checked, name, None)) is int and number > 0}
    positions = max_positions(base_config)

    @cache  # a method that changes layers builds the base to be counted
    def count(**sizes: int) -> int:
        if positions is not None and sizes.get("num_virtual_tokens", 0) > max(1, positions // 2):
            raise PtmoeError(f"more than half of the base's {positions} positions")
        return attach.count_parameters(base_config, config_class(**given, **sizes))

    lowered: dict[str, int] = {}
    for name in config_class.free_sizes:
        if name in given:
            continue
        lowered[name] = _smallest(partial(count, **lowered), name, numbers)
        if count(**lowered) <= budget:
            sizes = {other: size for other, size in lowered.items() if other != name}
            for free in (name, *sizes):  # what was lowered may find room again
                others = {other: size for other, size in sizes.items() if other != free}
                sizes[free] = _largest(partial(count, **others), free, lowered[free], budget)
            return config_class(**given, **sizes)
    least = count(**lowered)
    if least <= budget:
        return config_class(**given)
    smallest = ", ".join(f"{name}={(given | lowered)[name]}" for name in config_class.free_sizes)
    raise PtmoeError(
        f"budget {budget:,} is below {config_class.method}'s {'smallest size' if lowered else 'size'}"
        f"{f' ({smallest})' if smallest else ''} on this base, {least:,}: raise the budget or leave "
        f"{config_class.method} out"
    )


def _smallest(count: Callable[..., int], name: str, given: set[int]) -> int:
    """1, or the given number that this size must not be less than: a rank of 8 needs 8 tokens.

    Raises:
        PtmoeError: none of these fits; the reason is that of 1.
    """
    unfit = None
    for size in sorted({1, *given}):
        try:
            count(**{name: size})
        except PtmoeError as error:
            unfit = unfit or error
        else:
            return size
    assert unfit is not None
    raise unfit


def _largest(count: Callable[..., int], name: str, least: int, budget: int) -> int:
    """The largest size whose count is within the budget; that of `least` is, and counts grow with the size.

    Counts are linear in every size so far, so two of them predict the result, and two more confirm it. A size that does
    not fit the base raises, and is too large; where that, or a count that is not linear, spoils the guess, a binary
    search follows.
    """

    def fits(size: int) -> bool:
        try:
            return count(**{name: size}) <= budget
        except PtmoeError:
            return False

    if not fits(least + 1):
        return least
    first, second = (count(**{name: size}) for size in (least, least + 1))
    if first == second:
        return least
    low = least + 1
    high = low + 1 + (budget - second) // (second - first)  # the first that should be too large
    if fits(high - 1):
        low = high - 1
        while fits(high):
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
