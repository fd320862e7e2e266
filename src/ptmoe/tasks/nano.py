"""The tasks of nano's generated world (`ptmoe.nano.world`): the domain decides what to do with the input.

    nano/mixed      harbor: 12 and 30 =>            42
                    market: 12 and 30 =>            30 and 12
    nano/words      station: key cup pen =>         pen cup key
    nano/facts      museum: Ann has key, Bob has cup =>    Ann
    nano/all        the three together
    nano/skills     Add the numbers.                the instruction in words, as in pretraining
                    garden: 12 and 30 =>            42

Scored by exact match of the answer.
"""

from collections.abc import Iterator
from itertools import islice

from ptmoe.nano.world import TASK_LONGEST, WORLDS, instructed, uninstructed
from ptmoe.tasks.base import Example

SPLITS = {"train": 8000, "validation": 400, "test": 1000}
NAMES = (*(f"nano/{world}" for world in WORLDS), "nano/skills")
_SEEDS = {"train": 1, "validation": 2, "test": 3}


def load(name: str, split: str) -> Iterator[Example]:
    """The same examples every time. Inputs of `validation` and `test` are in no training set, nor in pretraining."""
    world = name.removeprefix("nano/")
    seed, held_out = _SEEDS[split], split != "train"
    if world == "skills":
        records = instructed(seed, test=held_out, longest=TASK_LONGEST)
    else:
        records = uninstructed(world, seed, test=held_out)
    for number, record in enumerate(islice(records, SPLITS[split])):
        yield Example(
            id=f"{split}-{number}",
            input=record.prompt,
            target=record.completion,
            references=(record.answer,),
            task=name,
            domain=record.skill if world == "skills" else record.domain,
        )
