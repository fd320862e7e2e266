"""Trainable parameters as a budget: `80k` picks each method's free size for a base, from the base's config alone.

pt on Llama-3.2-1B, H = 2048, 80k     39 tokens    79,872 (40 would be 81,920)
pt-moe, T = 40, N = 2                 rank 35      78,578 (36 would be 80,706)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from annotated_types import Ge

from ptmoe.errors import PtmoeError

if TYPE_CHECKING:
    from ptmoe.methods.base import MethodConfig

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_budget(text: str | int) -> int:
    """A number of parameters: `80k`, `1.5M`, `80_000`, `80,000` or `80000`.

    Raises:
        PtmoeError: anything else, or less than 1.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kmb]?)", str(text).strip().lower())
    number = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2]] if found else 0.0
    if number < 1 or number != round(number):
        raise PtmoeError(f"budget {text!r}: needs a whole number of parameters, such as 80k, 1.5M or 80000")
    return round(number)


def sizes_of(config: MethodConfig) -> dict[str, int]:
    """The fields of type `ptmoe.methods.base.Size`, which make up what tables call a method's size."""
    fields = type(config).model_fields.items()
    return {
        name: getattr(config, name) for name, field in fields if field.annotation is int and Ge(1) in field.metadata
    }


def base_config(model: str, revision: str | None = None) -> Any:
    """The `transformers` config of nano, a folder or a Hub repository.

    Raises:
        PtmoeError: no such model.
    """
    from transformers import AutoConfig

    from ptmoe import nano

    try:
        return AutoConfig.from_pretrained(nano.FOLDER if model == nano.NAME else model, revision=revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PtmoeError(
            f"unknown model {model!r}: not nano, not a folder, and the Hub does not have it ({reason})"
        ) from None


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
        allow. Where even 1 is too much, the next free size is lowered. A prompt has at most half the base's positions.

    Raises:
        PtmoeError: the smallest size exceeds the budget, or a given field does not fit the method or the base.
    """
    from ptmoe.models.attach import count_parameters

    fixed = dict(fixed or {})
    config_class(**fixed)  # report a misspelt field as such
    positions = getattr(base_config.get_text_config(), "max_position_embeddings", None)
    counted: dict[tuple[tuple[str, int], ...], int | PtmoeError] = {}

    def count(sizes: dict[str, int]) -> int:
        """Trainable parameters; counted once, since a method that changes layers builds the base for it."""
        key = tuple(sizes.items())
        if key not in counted:
            try:
                if positions is not None and sizes.get("num_virtual_tokens", 0) > max(1, positions // 2):
                    raise PtmoeError(f"more than half of the base's {positions} positions")
                counted[key] = count_parameters(base_config, config_class(**fixed, **sizes))
            except PtmoeError as error:
                counted[key] = error
        result = counted[key]
        if isinstance(result, PtmoeError):
            raise result
        return result

    free = [name for name in config_class.free_sizes if name not in fixed]
    smallest: dict[str, int] = {}
    for name in free:

        def count_at(size: int, name: str = name, lowered: tuple[str, ...] = tuple(smallest)) -> int:
            return count({**dict.fromkeys(lowered, 1), name: size})

        if count_at(1) <= budget:
            return config_class(**fixed, **smallest, **{name: _largest(count_at, budget)})
        smallest[name] = 1
    least = count(smallest)
    if least <= budget:
        return config_class(**fixed, **smallest)
    given = ", ".join(f"{name}={fixed.get(name, 1)}" for name in config_class.free_sizes)
    raise PtmoeError(
        f"budget {budget:,} is below {config_class.method}'s {'smallest size' if free else 'size'}"
        f"{f' ({given})' if given else ''} on this base, {least:,}: raise the budget or leave {config_class.method} out"
    )


def _largest(count: Callable[[int], int], budget: int) -> int:
    """The largest size whose count is within the budget; `count(1)` is, and counts grow with the size.

    Counts are linear in every size so far, so two of them predict the result, and two more confirm it. A size that does
    not fit the base raises, and is too large; where that, or a count that is not linear, spoils the guess, a binary
    search follows.
    """

    def fits(size: int) -> bool:
        try:
            return count(size) <= budget
        except PtmoeError:
            return False

    if not fits(2) or count(2) == count(1):
        return 1
    low, step = 2, max(1, count(2) - count(1))
    high = low + (budget - count(2)) // step + 1  # the first that should be too large
    if fits(high - 1):
        low = high - 1
        while fits(high):
            low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
