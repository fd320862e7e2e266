"""Several processes that evaluate together: what one of them has or finds, in all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from ptmoe.errors import PtmoeError
from ptmoe.runs.environment import rank, world_size

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    from torch.distributed import all_gather_object

    values: list[Any] = [None] * world_size()
    all_gather_object(values, value)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, which alone calls it.

    Raises:
        PtmoeError: in all processes, the error that it ended in there.
    """
    from torch.distributed import broadcast_object_list

    made: list[Any] = [None]
    if rank() == 0:
        try:
            made = [make()]
        except PtmoeError as error:
            made = [error]
    broadcast_object_list(made)
    if isinstance(made[0], PtmoeError):
        raise made[0]
    result: T = made[0]
    return result
