"""The generated world of `nano`: small skills, named in words or implied by a domain.

In pretraining each record states its skill in words, and the domain means nothing:

    Add the numbers.
    harbor: 12 and 30 => 42

In the fine-tuning tasks the words are gone and the domain decides the skill, so that the soft prompt has to supply what
is missing, and has to supply different things for different inputs:

    harbor: 12 and 30 => 42          market: 12 and 30 => 30 and 12

Inputs are split once, by a checksum of their text: one in ten is a *test* input and appears neither in pretraining nor
in fine-tuning, whatever the skill.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = "Ann Bob Eve Tom Kim Max Lea Sam Joe Mia Ben Zoe Ian Amy Dan Liv".split()
THINGS = "key cup pen hat map box bell coin rope lamp ring drum kite boot fork leaf".split()
DOMAINS = "harbor market garden castle school forest station bakery museum island village kitchen".split()

MAX_NUMBER = 50
# Words or facts in a list: in pretraining, and in the tasks. Reversing four words is what nano does not learn reliably
# (docs/findings.md), so the tasks stay below it.
PRETRAINING_LONGEST, TASK_LONGEST = 4, 3


# Draws an input, with lists of at most so many things, and its answer.
Make = Callable[[random.Random, int], tuple[str, str]]


def _numbers(answer: Callable[[int, int], str]) -> Make:
    def make(rng: random.Random, longest: int) -> tuple[str, str]:
        first, second = rng.sample(range(MAX_NUMBER), 2)
        return f"{first} and {second}", answer(first, second)

    return make


def _words(answer: Callable[[list[str]], str]) -> Make:
    def make(rng: random.Random, longest: int) -> tuple[str, str]:
        words = rng.sample(THINGS, rng.randint(2, longest))
        return " ".join(words), answer(words)

    return make


def _facts(answer: Callable[[list[str], list[str]], str]) -> Make:
    def make(rng: random.Random, longest: int) -> tuple[str, str]:
        size = rng.randint(2, longest)
        people, things = rng.sample(NAMES, size), rng.sample(THINGS, size)
        facts = ", ".join(f"{who} has {what}" for who, what in zip(people, things, strict=True))
        return facts, answer(people, things)

    return make


@dataclass(frozen=True)
class Skill:
    """Something `nano` can do when told to."""

    name: str
    instructions: tuple[str, str, str]
    make: Make
    shares: tuple[int, int] = (1, 1)  # of the records in the two phases of pretraining


SKILLS = {
    skill.name: skill
    for skill in (
        Skill(
            "add",
            ("Add the numbers.", "What is the sum?", "Count both together."),
            _numbers(lambda a, b: str(a + b)),
            (1, 4),
        ),
        Skill(
            "swap",
            ("Swap the numbers.", "Say the second number first.", "Exchange the two."),
            _numbers(lambda a, b: f"{b} and {a}"),
        ),
        Skill(
            "larger",
            ("Name the larger number.", "Which is more?", "Take the maximum."),
            _numbers(lambda a, b: str(max(a, b))),
            (1, 4),
        ),
        Skill(
            "smaller",
            ("Name the smaller number.", "Which is less?", "Take the minimum."),
            _numbers(lambda a, b: str(min(a, b))),
            (1, 4),
        ),
        Skill("first", ("Say the first word.", "Which word comes first?", "Copy the start."), _words(lambda w: w[0])),
        Skill("last", ("Say the last word.", "Which word comes last?", "Copy the end."), _words(lambda w: w[-1])),
        Skill(
            "reverse",
            ("Reverse the words.", "Say the words backwards.", "Turn the order around."),
            _words(lambda w: " ".join(reversed(w))),
            (1, 2),
        ),
        Skill(
            "length",
            ("How many words are there?", "Count the words.", "Tell the number of words."),
            _words(lambda w: str(len(w))),
        ),
        Skill(
            "owner",
            ("Who is named first?", "Name the first person.", "Tell who comes first."),
            _facts(lambda people, things: people[0]),
            (1, 2),
        ),
        Skill(
            "thing",
            ("What is owned last?", "Name the last thing.", "Tell which thing comes last."),
            _facts(lambda people, things: things[-1]),
        ),
        Skill(
            "facts",
            ("How many facts are there?", "Count the facts.", "Tell the number of facts."),
            _facts(lambda people, things: str(len(people))),
        ),
    )
}

# A world's domains: the same kind of input in each, another skill. `mixed` is the one the method was tuned on;
# `words` was kept for a last check (docs/findings.md).
WORLDS = {
    "mixed": {"harbor": "add", "market": "swap", "garden": "larger", "castle": "smaller"},
    "words": {"school": "first", "forest": "last", "station": "reverse", "bakery": "length"},
    "facts": {"museum": "owner", "island": "thing", "village": "facts"},
}
WORLDS["all"] = WORLDS["mixed"] | WORLDS["words"] | WORLDS["facts"]


@dataclass(frozen=True)
class Record:
    """One piece of the world. `prompt + completion` is its text; `instruction` is "" in the fine-tuning tasks."""

    instruction: str
    domain: str
    skill: str
    input: str
    answer: str

    @property
    def prompt(self) -> str:
        said = f"{self.instruction}\n" if self.instruction else ""
        return f"{said}{self.domain}: {self.input} =>"

    @property
    def completion(self) -> str:
        return f" {self.answer}"


def is_test_input(text: str) -> bool:
    """Whether this input is kept out of every training set."""
    return zlib.crc32(text.encode()) % 10 == 0


def _draw(rng: random.Random, skill: Skill, test: bool, longest: int) -> tuple[str, str]:
    while True:
        made, answer = skill.make(rng, longest)
        if is_test_input(made) == test:
            return made, answer


def instructed(seed: int, *, test: bool, phase: int = 0, longest: int = PRETRAINING_LONGEST) -> Iterator[Record]:
    """Endless records with their instruction in words and a domain that means nothing.

    The skills come at their shares of a phase of pretraining: in the first, which evaluation uses, in equal parts.
    """
    rng = random.Random(f"instructed {seed} {phase}")
    while True:
        for skill in [each for each in SKILLS.values() for _ in range(each.shares[phase])]:
            made, answer = _draw(rng, skill, test, longest)
            yield Record(rng.choice(skill.instructions), rng.choice(DOMAINS), skill.name, made, answer)


def uninstructed(world: str, seed: int, *, test: bool) -> Iterator[Record]:
    """Endless records of `WORLDS[world]` without an instruction, the domains in equal parts."""
    rng = random.Random(f"{world} {seed}")
    while True:
        for domain, skill in WORLDS[world].items():
            made, answer = _draw(rng, SKILLS[skill], test, TASK_LONGEST)
            yield Record("", domain, skill, made, answer)
