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

NAMES = "Ann Bob Eve Tom Kim Max Lea Sam Joe Mia Ben Zoe Ian Amy Dan Liv".split()
THINGS = "key cup pen hat map box bell coin rope lamp ring drum kite boot fork leaf".split()
DOMAINS = "harbor market garden castle school forest station bakery museum island village kitchen".split()

MAX_NUMBER = 50
# Maximum words or facts in a list: in pretraining, and in the tasks. nano does not learn reliably to reverse four words
# (docs/findings.md), so the tasks have fewer.
PRETRAINING_LONGEST, TASK_LONGEST = 4, 3


# Draws an input, whose list has at most the given length, and its answer.
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
    """Something `nano` can do when instructed."""

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
        text, answer = skill.make(rng, longest)
        if is_test_input(text) == test:
            return text, answer


def instructed(seed: int, *, test: bool, phase: int = 0, longest: int = PRETRAINING_LONGEST) -> Iterator[Record]:
    """An endless stream of records with an instruction in words and a domain without meaning.

    Each skill has its share in the given phase of pretraining: in the first, which evaluation uses, an equal share.
    """
    rng = random.Random(f"instructed {seed} {phase}")
    while True:
        for skill in SKILLS.values():
            for _ in range(skill.shares[phase]):
                text, answer = _draw(rng, skill, test, longest)
                yield Record(rng.choice(skill.instructions), rng.choice(DOMAINS), skill.name, text, answer)


def uninstructed(world: str, seed: int, *, test: bool) -> Iterator[Record]:
    """An endless stream of records of `WORLDS[world]` without an instruction, with the domains in equal shares."""
    rng = random.Random(f"{world} {seed}")
    while True:
        for domain, skill in WORLDS[world].items():
            text, answer = _draw(rng, SKILLS[skill], test, TASK_LONGEST)
            yield Record("", domain, skill, text, answer)
