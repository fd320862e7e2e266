"""The generated world of `nano`: small skills, named in words or implied by a domain.

In pretraining each record states its skill in words, and the domain has no meaning:

    Add the numbers.
    harbor: 12 and 30 => 42

In the fine-tuning tasks the instruction is absent and the domain decides the skill, so that the soft prompt has to
supply what is missing, and something different for different inputs:

    harbor: 12 and 30 => 42          market: 12 and 30 => 30 and 12

Inputs are split once, by a checksum of their text: a tenth are *test* inputs, which appear neither in pretraining nor
in fine-tuning, whatever the skill.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

NAMES = "Ann Bob Eve Tom Kim Max Lea Sam Joe Mia Ben Zoe Ian Amy Dan Liv".split()
THINGS = "key cup pen hat map box bell coin rope lamp ring drum kite boot fork leaf".split()
DOMAINS = "harbor market garden castle school forest station bakery museum island village kitchen".split()

MAX_NUMBER = 50
# Maximum words or facts in a list: in pretraining, and in the tasks. nano does not learn to reverse four words reliably
# (docs/findings.md), so the tasks have fewer.
PRETRAINING_LONGEST, TASK_LONGEST = 4, 3


Draw = Callable[[random.Random, int], tuple[str, tuple[Any, ...]]]
"""Draws an input whose list has at most the given length; returns its text and what it consists of."""


def _numbers(rng: random.Random, longest: int) -> tuple[str, tuple[Any, ...]]:
    first, second = rng.sample(range(MAX_NUMBER), 2)
    return f"{first} and {second}", (first, second)


def _words(rng: random.Random, longest: int) -> tuple[str, tuple[Any, ...]]:
    words = rng.sample(THINGS, rng.randint(2, longest))
    return " ".join(words), tuple(words)


def _facts(rng: random.Random, longest: int) -> tuple[str, tuple[Any, ...]]:
    size = rng.randint(2, longest)
    people, things = rng.sample(NAMES, size), rng.sample(THINGS, size)
    return ", ".join(f"{who} has {what}" for who, what in zip(people, things, strict=True)), (people, things)


@dataclass(frozen=True)
class Skill:
    """Something `nano` can do when instructed."""

    draw: Draw  # draws an input
    answer: Callable[..., Any]  # from what the input consists of
    instructions: tuple[str, str, str]  # three ways to say it
    later_share: int = 1  # of the records in the second phase of pretraining; in the first, each skill has a share of 1


SKILLS = {
    "add": Skill(_numbers, lambda a, b: a + b, ("Add the numbers.", "What is the sum?", "Count both together."), 4),
    "swap": Skill(
        _numbers,
        lambda a, b: f"{b} and {a}",
        ("Swap the numbers.", "Say the second number first.", "Exchange the two."),
    ),
    "larger": Skill(_numbers, max, ("Name the larger number.", "Which is more?", "Take the maximum."), 4),
    "smaller": Skill(_numbers, min, ("Name the smaller number.", "Which is less?", "Take the minimum."), 4),
    "first": Skill(_words, lambda *w: w[0], ("Say the first word.", "Which word comes first?", "Copy the start.")),
    "last": Skill(_words, lambda *w: w[-1], ("Say the last word.", "Which word comes last?", "Copy the end.")),
    "reverse": Skill(
        _words,
        lambda *w: " ".join(reversed(w)),
        ("Reverse the words.", "Say the words backwards.", "Turn the order around."),
        2,
    ),
    "length": Skill(
        _words, lambda *w: len(w), ("How many words are there?", "Count the words.", "Tell the number of words.")
    ),
    "owner": Skill(
        _facts, lambda who, what: who[0], ("Who is named first?", "Name the first person.", "Tell who comes first."), 2
    ),
    "thing": Skill(
        _facts,
        lambda who, what: what[-1],
        ("What is owned last?", "Name the last thing.", "Tell which thing comes last."),
    ),
    "facts": Skill(
        _facts,
        lambda who, what: len(who),
        ("How many facts are there?", "Count the facts.", "Tell the number of facts."),
    ),
}

# A world's domains: the same kind of input in each, but another skill. The method was tuned on `mixed`; `words` was
# reserved for a final check (docs/findings.md).
WORLDS = {
    "mixed": {"harbor": "add", "market": "swap", "garden": "larger", "castle": "smaller"},
    "words": {"school": "first", "forest": "last", "station": "reverse", "bakery": "length"},
    "facts": {"museum": "owner", "island": "thing", "village": "facts"},
}
WORLDS["all"] = WORLDS["mixed"] | WORLDS["words"] | WORLDS["facts"]


@dataclass(frozen=True)
class Record:
    """A record of the world. `prompt + completion` is its text; `instruction` is "" in the fine-tuning tasks."""

    instruction: str
    domain: str
    skill: str
    input: str
    answer: str

    @property
    def prompt(self) -> str:
        instruction = f"{self.instruction}\n" if self.instruction else ""
        return f"{instruction}{self.domain}: {self.input} =>"

    @property
    def completion(self) -> str:
        return f" {self.answer}"


def is_test_input(text: str) -> bool:
    """Whether this input is excluded from every training set."""
    return zlib.crc32(text.encode()) % 10 == 0


def _draw(rng: random.Random, skill: Skill, test: bool, longest: int) -> tuple[str, str]:
    while True:
        text, parts = skill.draw(rng, longest)
        if is_test_input(text) == test:
            return text, str(skill.answer(*parts))


def instructed(seed: int, *, test: bool, phase: int = 0, longest: int = PRETRAINING_LONGEST) -> Iterator[Record]:
    """An endless stream of records with an instruction in words and a domain without meaning.

    Each skill has its share in the given phase of pretraining: in the first, which evaluation uses, an equal share.
    """
    rng = random.Random(f"instructed {seed} {phase}")
    while True:
        for name, skill in SKILLS.items():
            for _ in range(skill.later_share if phase else 1):
                text, answer = _draw(rng, skill, test, longest)
                yield Record(rng.choice(skill.instructions), rng.choice(DOMAINS), name, text, answer)


def uninstructed(world: str, seed: int, *, test: bool) -> Iterator[Record]:
    """An endless stream of records of `WORLDS[world]` without an instruction, with the domains in equal shares."""
    rng = random.Random(f"{world} {seed}")
    while True:
        for domain, skill in WORLDS[world].items():
            yield Record("", domain, skill, *_draw(rng, SKILLS[skill], test, TASK_LONGEST))
