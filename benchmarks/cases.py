"""Everything that is measured: the cases of each part, their systems, and the goals. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.lengths import Lengths, sample
from benchmarks.shapes import SHAPES

PARTS = ("step", "epoch", "generate", "adapters", "curves", "linear", "head", "attention", "startup", "study")
VIRTUAL = 40
PT_MOE = {"name": "pt-moe", "num_virtual_tokens": VIRTUAL, "num_experts": 2, "rank": 36}
PT = {"name": "pt", "num_virtual_tokens": VIRTUAL}
EQUAL = [208, 8]  # prompt and answer: 216 real tokens, 256 with the virtual ones
STEP_ROWS = 8
OURS = "ptmoe pt-moe"
LIMIT = "limit"


@dataclass(frozen=True)
class Case:
    """Systems that are measured in turns.

    Attributes:
        part: of `PARTS`.
        name: the case within its part.
        shape: of the base; or "" where there is none.
        dtype: of the base.
        systems: what the worker calls for each (`run`, a function in `benchmarks.parts`) and with what.
        reference: what the others are compared with; of several whose name starts with it, the fastest.
        resident: whether all systems' processes are there at once. Otherwise each round starts its own.
        warm_up: before a process' first round: a whole round, a `"brief"` one, or none.
    """

    part: str
    name: str
    shape: str
    dtype: str
    systems: dict[str, dict[str, Any]]
    reference: str = OURS
    resident: bool = True
    warm_up: Literal["whole", "brief", "none"] = "whole"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.part, self.name, self.shape, self.dtype

    def request(self, system: str) -> dict[str, Any]:
        """What its worker is told."""
        return {"shape": self.shape, "dtype": self.dtype, "warm_up": self.warm_up, **self.systems[system]}


@dataclass(frozen=True)
class Amount:
    """How much a round does, so that it takes seconds on a CPU and on a GPU.

    Attributes:
        examples: of an epoch.
        prompts: that are completed.
        places: tokens that a batch of completions may hold: rows · (longest prompt + virtual + new).
        new_tokens: of a completion.
        repeats: steps that a round's time is the mean of.
        adapters: how many are loaded, in turn.
    """

    examples: int
    prompts: int
    places: int
    new_tokens: int = 64
    repeats: int = 1
    adapters: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)


AMOUNTS = {
    ("cpu", "sketch"): Amount(examples=32, prompts=64, places=4_096, repeats=2),
    ("cpu", "llama-1b"): Amount(examples=8, prompts=8, places=4_096),
    ("cuda", "sketch"): Amount(examples=512, prompts=256, places=65_536, repeats=20),
    ("cuda", "llama-1b"): Amount(examples=256, prompts=256, places=65_536, repeats=10),
}
QUICK_SHAPE = "tiny"
QUICK = Amount(examples=8, prompts=6, places=2_048, new_tokens=4, repeats=1, adapters=(1, 10, 20))


def _default_shapes(part: str, device: str) -> tuple[str, ...]:
    """On a CPU the sketch shows in minutes what most parts would show at a larger size in hours."""
    if device == "cuda":
        return ("llama-1b",)
    return ("sketch", "llama-1b") if part in ("step", "epoch") else ("sketch",)


def _default_dtypes(part: str, shape: str) -> tuple[str, ...]:
    if part in ("head", "attention"):
        return ("bfloat16",)
    return SHAPES[shape].dtypes if part == "step" else SHAPES[shape].dtypes[:1]


def cases(
    parts: Sequence[str],
    shapes: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    device: str,
    *,
    quick: bool = False,
) -> Iterator[Case]:
    """In the order in which they are measured.

    Args:
        parts: of `PARTS`.
        shapes: of `SHAPES`; by default those that suit the part.
        dtypes: by default those of the shape.
        device: `"cpu"` or `"cuda"`.
        quick: little work, on any shape.
    """
    for part in parts:
        if part == "startup":
            yield _startup(repeats=1 if quick else 5)
            continue
        if part == "study":
            yield _study(cells=2 if quick else 40, steps=2 if quick else 80)
            continue
        if part in ("linear", "head", "attention") and device != "cpu":
            continue
        for shape in shapes or _default_shapes(part, device):
            amount = QUICK if quick else AMOUNTS[device, shape]
            resident = SHAPES[shape].resident or device == "cuda"
            usual = {"resident": resident, "warm_up": "whole" if resident and not quick else "brief"}
            for dtype in dtypes or _default_dtypes(part, shape):
                for case in _MAKE[part](amount):
                    yield Case(**{"part": part, "shape": shape, "dtype": dtype, **usual, **case})


def _training(method: dict[str, Any], lengths: Lengths, amount: Amount) -> dict[str, Any]:
    return {"run": "step.training", "method": method, "lengths": lengths, "repeats": amount.repeats}


def _step(amount: Amount) -> Iterator[dict[str, Any]]:
    passages = sample("passages", STEP_ROWS, seed=0)
    for name, lengths in (("equal lengths", [EQUAL] * STEP_ROWS), ("passages", passages)):
        ways = ["row by row", "packed"]
        if len({*map(sum, lengths)}) < STEP_ROWS:
            ways.append("rows of a length at once")
        limits = {
            f"{LIMIT}, {way}": {
                "run": "step.limit",
                "way": way,
                "lengths": lengths,
                "virtual": VIRTUAL,
                "repeats": amount.repeats,
            }
            for way in ways
        }
        ours = {
            OURS: _training(PT_MOE, lengths, amount),
            f"{OURS}, layers compiled": _training(PT_MOE, lengths, amount) | {"compiled": True},
            "ptmoe pt": _training(PT, lengths, amount),
        }
        yield {"name": name, "systems": ours | limits, "reference": LIMIT}


def _epoch(amount: Amount) -> Iterator[dict[str, Any]]:
    common = {"lengths": sample("passages", amount.examples, seed=1), "batch_size": 8}
    peers = common | {"virtual": VIRTUAL}
    yield {
        "name": "passages",
        "systems": {
            OURS: {"run": "epoch.ptmoe", "method": PT_MOE, **common},
            "ptmoe pt": {"run": "epoch.ptmoe", "method": PT, **common},
            "Trainer + peft prompt tuning": {"run": "epoch.peft", "method": "prompt tuning", **peers},
            "Trainer + peft LoRA": {"run": "epoch.peft", "method": "lora", **peers},
            "trl SFTTrainer + peft prompt tuning": {"run": "epoch.trl", **peers},
        },
    }


def _generate(amount: Amount) -> Iterator[dict[str, Any]]:
    lengths = sample("passages", amount.prompts, seed=2)
    common = {"lengths": lengths, "virtual": VIRTUAL, "places": amount.places, "new_tokens": amount.new_tokens}
    for name, ends in (("no row ends early", False), ("answers end", True)):
        settings = common | {"ends": ends}
        yield {
            "name": name,
            "warm_up": "brief",
            "systems": {
                OURS: {"run": "generate.ptmoe", "method": PT_MOE, **settings},
                "ptmoe pt": {"run": "generate.ptmoe", "method": PT, **settings},
                "peft prompt tuning": {"run": "generate.peft", "by_length": False, **settings},
                "peft prompt tuning, prompts sorted": {"run": "generate.peft", "by_length": True, **settings},
            },
        }


def _adapters(amount: Amount) -> Iterator[dict[str, Any]]:
    yield {
        "name": "adapters on one base",
        "systems": {OURS: {"run": "adapters.loaded", "method": PT_MOE, "counts": amount.adapters}},
        "resident": False,
        "warm_up": "none",
    }


def _curves(amount: Amount) -> Iterator[dict[str, Any]]:
    def prompt(tokens: int = VIRTUAL, experts: int = 2) -> dict[str, Any]:
        return PT_MOE | {"num_virtual_tokens": tokens, "num_experts": experts, "rank": min(36, tokens)}

    def rows(real: int, supervised: int) -> Lengths:
        return [[real - supervised, supervised]] * STEP_ROWS

    curves = {
        "real tokens of a row": {n: (prompt(), rows(n, 8)) for n in (64, 256, 1_024)},
        "virtual tokens": {n: (prompt(tokens=n), [EQUAL] * STEP_ROWS) for n in (10, 40, 160)},
        "experts": {n: (prompt(experts=n), [EQUAL] * STEP_ROWS) for n in (2, 16, 256)},
        "supervised tokens of 216": {n: (prompt(), rows(216, n)) for n in (8, 64, 215)},
    }
    for name, points in curves.items():
        systems = {f"{n:,}": _training(method, lengths, amount) for n, (method, lengths) in points.items()}
        yield {"name": name, "systems": systems, "reference": next(iter(systems))}


def _linear(_: Amount) -> Iterator[dict[str, Any]]:
    for of, rows, backward in (("head", 13, False), ("up", 13, False), ("head", 64, True), ("up", 2_048, True)):
        common = {"run": "linear.layer", "of": of, "rows": rows, "backward": backward, "repeats": 20}
        yield {
            "name": f"{'the head' if of == 'head' else 'a layer'}, {'training' if backward else 'decoding'}",
            "systems": {way: common | {"way": way} for way in ("oneDNN", "torch")},
            "reference": "oneDNN",
        }


def _head(_: Amount) -> Iterator[dict[str, Any]]:
    for rows in (8, 64):
        common = {"run": "linear.first_scores", "rows": rows, "tokens": 60, "repeats": 3}
        yield {
            "name": f"{rows} rows of 60 tokens",
            "systems": {way: common | {"way": way} for way in ("copied", "gaps")},
            "reference": "copied",
        }


def _attention(_: Amount) -> Iterator[dict[str, Any]]:
    for tokens in (60, 100, 250, 500):
        common = {"run": "attention.layer", "rows": STEP_ROWS, "tokens": tokens, "repeats": 20}
        yield {
            "name": f"{STEP_ROWS} rows of {tokens} tokens",
            "systems": {way: common | {"way": way} for way in ("products", "torch")},
            "reference": "products",
        }


def _startup(repeats: int) -> Case:
    commands = {
        "ptmoe --help": ["-m", "ptmoe", "--help"],
        "import ptmoe": ["-c", "import ptmoe"],
        "python alone": ["-c", ""],
        **{f"import {name}": ["-c", f"import {name}"] for name in ("transformers", "peft", "trl")},
    }
    systems = {
        name: {"run": "startup.command", "arguments": arguments, "repeats": repeats}
        for name, arguments in commands.items()
    }
    return Case("startup", "a new process", "", "", systems, reference="python alone")


def _study(cells: int, steps: int) -> Case:
    systems = {
        place: {"run": "study.compare", "on": place, "cells": cells, "steps": steps} for place in ("processes", "ray")
    }
    name = f"{cells} cells of {steps} steps on nano"
    return Case("study", name, "", "", systems, reference="processes", warm_up="none")


_MAKE = {
    "step": _step,
    "epoch": _epoch,
    "generate": _generate,
    "adapters": _adapters,
    "curves": _curves,
    "linear": _linear,
    "head": _head,
    "attention": _attention,
}


@dataclass(frozen=True)
class Goal:
    """A bound on a number of one system, or on its ratio to another's.

    Attributes:
        text: what is to hold.
        part: whose cases it is about; all of them, or those called `name` and on `shape`.
        system: whose number.
        over: divided by this one's, round by round; of several whose name starts so, the fastest.
        of: the number: `"seconds"`, `"peak_bytes"`, `"adapter_over_parameters"`.
        at_most: the bound, from above; or `at_least`, from below.
        device: that it is about; all by default.
    """

    text: str
    part: str
    system: str
    over: str | None = None
    of: str = "seconds"
    at_most: float | None = None
    at_least: float | None = None
    name: str | None = None
    shape: str | None = None
    device: str | None = None


PROMPT_TUNING, LORA = "Trainer + peft prompt tuning", "Trainer + peft LoRA"
TRL = "trl SFTTrainer + peft prompt tuning"
GOALS = (
    Goal("a step takes at most 1.05 of the limit", "step", OURS, LIMIT, at_most=1.05),
    Goal("an epoch is 6 × faster than Trainer + peft prompt tuning", "epoch", PROMPT_TUNING, OURS, at_least=6,
         shape="sketch", device="cpu"),
    Goal("and takes at most 0.30 of its memory", "epoch", OURS, PROMPT_TUNING, "peak_bytes", at_most=0.30,
         shape="sketch", device="cpu"),
    Goal("an epoch is 5 × faster than Trainer + peft LoRA", "epoch", LORA, OURS, at_least=5,
         shape="sketch", device="cpu"),
    Goal("an epoch is 2 × faster than Trainer + peft prompt tuning", "epoch", PROMPT_TUNING, OURS, at_least=2,
         shape="llama-1b"),
    Goal("an epoch is 2 × faster than Trainer + peft LoRA", "epoch", LORA, OURS, at_least=2, shape="llama-1b"),
    Goal("an epoch is 6 × faster than trl SFTTrainer + peft", "epoch", TRL, OURS, at_least=6, device="cpu"),
    Goal("an epoch is 1.3 × faster than trl SFTTrainer + peft", "epoch", TRL, OURS, at_least=1.3, device="cuda"),
    Goal("completions are 2 × faster than peft's generate", "generate", "peft prompt tuning", OURS, at_least=2),
    Goal("one adapter more takes its parameters' bytes, within 10 %", "adapters", OURS, of="adapter_over_parameters",
         at_most=1.10),
    Goal("256 experts instead of 2 cost less than 2 % of a step", "curves", "256", "2", at_most=1.02, name="experts"),
    Goal("ptmoe --help takes less than 0.5 s", "startup", "ptmoe --help", at_most=0.5),
    Goal("import ptmoe takes less than 0.3 s", "startup", "import ptmoe", at_most=0.3),
    Goal("a study on Ray takes at most 5 % longer than in processes", "study", "ray", "processes", at_most=1.05),
)  # fmt: skip
