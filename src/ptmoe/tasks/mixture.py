"""Several tasks as one, for training: `mrqa-in`, `gsm8k,svamp`, `gsm8k=2,mawps=1`.

Tasks alternate. Without weights every example of every task is used once. With weights the tasks keep their
proportions, in every prefix of the mixture as in the whole, and the mixture ends when one task is exhausted.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from ptmoe.errors import PtmoeError, near
from ptmoe.tasks.base import Example

Weights = dict[str, float | None]
"""The tasks of a mixture and their weights; either all have a weight or none."""


def parse(name: str, tasks: Collection[str], groups: Mapping[str, tuple[str, ...]]) -> Weights:
    """The weights in a mixture's name; a group's weight is split evenly among its tasks.

    Raises:
        PtmoeError: an unknown or repeated task, or unusable weights.
    """
    weights: Weights = {}
    for piece in name.split(","):
        task, equals, weight = piece.strip().partition("=")
        members = groups.get(task, (task,))
        for member in members:
            if member not in tasks:
                if os.path.exists(member):
                    kind = "folder" if os.path.isdir(member) else "file"
                    raise PtmoeError(f"{member} is a {kind}, and {name!r} mixes tasks, which files cannot be part of")
                known = near(member, [*tasks, *groups])
                raise PtmoeError(f"unknown task {member!r}{known} (there is no such file either)")
            if member in weights:
                raise PtmoeError(
                    f"task {member!r} appears twice in {name!r}: give each once, with a weight (gsm8k=2,mawps=1)"
                )
            weights[member] = _weight(weight, piece) / len(members) if equals else None
    if len({weight is None for weight in weights.values()}) > 1:
        raise PtmoeError(f"some tasks in {name!r} have a weight and some have none: give one to all or to none")
    return weights


def _weight(text: str, piece: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise PtmoeError(f"weight {text!r} in {piece!r}: needs a number above 0")
    return weight


def mixed(weights: Weights, streams: Iterable[Iterator[tuple[str, Example]]]) -> Iterator[tuple[str, Example]]:
    """The examples of all tasks with their locations, each time from the task that is furthest behind its share.

    The task's name is prepended to each id and becomes the example's domain.
    """
    active = dict(zip(weights, streams, strict=True))
    used = dict.fromkeys(active, 0)
    while active:
        task = min(active, key=lambda task: (used[task] + 1) / (weights[task] or 1.0))
        place, example = next(active[task], ("", None))
        if example is not None:
            used[task] += 1
            yield place, replace(example, id=f"{task}:{example.id}", domain=task)
        elif weights[task] is None:
            del active[task]
        else:
            return
