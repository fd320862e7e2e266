"""Several tasks as one, for training: `mrqa-in`, `gsm8k,svamp`, `gsm8k=2,mawps=1`.

Tasks alternate. Without weights every example of every task is used once. With weights the tasks keep their
proportions, in every prefix of the mixture as in the whole, and the mixture ends when one task is exhausted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks.base import Example


@dataclass(frozen=True)
class Part:
    """A task of a mixture and its weight; either all parts have a weight or none."""

    task: str
    weight: float | None


def parse(name: str, tasks: Collection[str], groups: Mapping[str, tuple[str, ...]]) -> list[Part]:
    """The parts of a mixture; a single task is one part. A group's weight is split evenly among its tasks.

    Raises:
        PtmoeError: an unknown or repeated task, or unusable weights.
    """
    parts: list[Part] = []
    for piece in name.split(","):
        task, equals, weight = piece.strip().partition("=")
        members = groups.get(task, (task,))
        for member in members:
            if member not in tasks:
                raise PtmoeError(f"unknown task {member!r}{near(member, [*tasks, *groups])}; or give a JSON-lines file")
            if any(part.task == member for part in parts):
                raise PtmoeError(
                    f"task {member!r} is twice in {name!r}: give each once, with a weight (gsm8k=2,mawps=1)"
                )
            parts.append(Part(member, _weight(weight, piece) / len(members) if equals else None))
    if len({part.weight is None for part in parts}) > 1:
        raise PtmoeError(f"some tasks in {name!r} have a weight and some have none: give all one, or none")
    return parts


def _weight(text: str, piece: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise PtmoeError(f"weight {text!r} in {piece!r}: needs a number above 0")
    return weight


def mixed(parts: Sequence[Part], streams: Sequence[Iterator[tuple[str, Example]]]) -> Iterator[tuple[str, Example]]:
    """The examples of all parts with their locations, each time from the part that is furthest behind its share.

    The task's name is prepended to each id and becomes the example's domain.
    """
    used = dict.fromkeys(range(len(parts)), 0)  # by the index of each part that is not exhausted
    while used:
        index = min(used, key=lambda i: ((used[i] + 1) / (parts[i].weight or 1.0), i))
        place, example = next(streams[index], ("", None))
        if example is not None:
            used[index] += 1
            yield place, replace(example, id=f"{example.task}:{example.id}", domain=example.task)
        elif parts[index].weight is None:
            del used[index]
        else:
            return
