"""RESULTS.md from the recorded rounds: goals and what was measured side by side, then every case as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import AMOUNTS, GOALS, LIMIT, PARTS, STEP_ROWS, VIRTUAL, Goal
from benchmarks.shapes import SHAPES

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
Result = dict[str, Any]  # a line of a results file: one finished case, all its rounds


@dataclass(frozen=True)
class Figure:
    """The median of some rounds and how far they spread."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        values = list(values)
        return cls(median(values), min(values), max(values))

    def text(self, unit: str = "") -> str:
        """`1.23 (1.20–1.31)`, with the median's digits."""
        if self.least == self.most:
            return f"{_digits(self.median)}{unit}"
        return f"{_digits(self.median)}{unit} ({_digits(self.least)}–{_digits(self.most)})"


def _digits(value: float) -> str:
    """Three digits that count, and no power of ten."""
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    digits = 2
    while size < 10 ** (2 - digits) and digits < 7:
        digits += 1
    return f"{value:.{digits - (size >= 10)}f}"


def read(path: Path) -> list[Result]:
    """The last line of each case, in the order of the parts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    latest = {tuple(line[name] for name in ("part", "name", "shape", "dtype")): line for line in lines}
    return sorted(latest.values(), key=lambda line: PARTS.index(line["part"]))


def values(result: Result, system: str, of: str = "seconds") -> list[float]:
    return [made[of] for made in result["rounds"][system]]


def fastest(result: Result, beginning: str) -> str | None:
    """The system whose name is this, or else starts with it, that took the least time; None where there is none."""
    names = [name for name in result["rounds"] if name == beginning]
    names = names or [name for name in result["rounds"] if name.startswith(beginning)]
    return min(names, key=lambda name: median(values(result, name)), default=None)


def ratios(result: Result, system: str, over: str, of: str = "seconds") -> Figure:
    """Round by round: what was measured in the same minutes is compared."""
    pairs = zip(values(result, system, of), values(result, over, of), strict=True)
    return Figure.of(one / other for one, other in pairs)


def measured(goal: Goal, result: Result) -> Figure | None:
    """What a case says about a goal: None where it is about other cases, or a system failed."""
    about = {"part": goal.part, "name": goal.name, "shape": goal.shape, "device": goal.device}
    if any(wanted is not None and result[field] != wanted for field, wanted in about.items()):
        return None
    if goal.system not in result["rounds"]:
        return None
    if goal.over is None:
        return Figure.of(values(result, goal.system, goal.of))
    over = fastest(result, goal.over)
    return None if over is None else ratios(result, goal.system, over, goal.of)


def is_met(goal: Goal, figure: Figure) -> bool:
    """By the median."""
    return (goal.at_most is None or figure.median <= goal.at_most) and (
        goal.at_least is None or figure.median >= goal.at_least
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> list[str]:
    """Markdown; the first columns are texts, the others numbers."""
    lines = [header, [*["---"] * texts, *["---:"] * (len(header) - texts)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def render(results: dict[str, list[Result]]) -> str:
    """The whole page, from the results of each device."""
    lines = [_ABOUT.strip(), ""]
    for device, found in results.items():
        if found:
            lines += [f"## {DEVICES[device]}", "", *_machines(found), *_goals(found)]
            for part in PARTS:
                here = [result for result in found if result["part"] == part]
                if here:
                    lines += ["", f"### {_PARTS[part][0]}", "", _PARTS[part][1]]
                for result in here:
                    lines += ["", *_case(result)]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _machines(found: list[Result]) -> list[str]:
    """What the device's results were measured on; a line for each environment among them."""
    lines = []
    for result in found:
        hardware, versions = result["environment"]["hardware"], result["environment"]["versions"]
        names = ("torch", "transformers", "peft", "trl", "accelerate", "python")
        lines.append(
            f"- {hardware['accelerator'] or hardware['processor']}, {hardware['memory_bytes'] / 2**30:.0f} GiB; "
            f"{hardware['cores']} cores, {hardware['threads']} threads; "
            + ", ".join(f"{name} {versions[name]}" for name in names)
        )
    return list(dict.fromkeys(lines))


def _goals(found: list[Result]) -> list[str]:
    rows = []
    for goal in GOALS:
        bound = f"≤ {goal.at_most:g}" if goal.at_most is not None else f"≥ {goal.at_least:g}"
        for result in found:
            figure = measured(goal, result)
            if figure is not None:
                verdict = "met" if is_met(goal, figure) else "**not met**"
                rows.append([goal.text, _where(result), bound, figure.text(), verdict])
    header = ["goal", "measured on", "wanted", "measured: median of the rounds (least–most)", ""]
    return ["", *table(header, rows, texts=2)] if rows else []


def _where(result: Result) -> str:
    return ", ".join(part for part in (result["shape"], result["dtype"], result["name"]) if part)


def _case(result: Result) -> list[str]:
    count = max((len(rounds) for rounds in result["rounds"].values()), default=0)
    lines = [
        f"**{_where(result)}** – rounds: {count}, {result['date']}, commit {result['environment']['commit']}, "
        f"`{result['command']}`",
        "",
        *(_points(result) if result["part"] == "adapters" else _systems(result)),
    ]
    return lines + [f"\n{name} could not be measured: {reason}." for name, reason in result["failures"].items()]


def _systems(result: Result) -> list[str]:
    reference = fastest(result, result["reference"])
    every = [made for rounds in result["rounds"].values() for made in rounds]
    extra = [name for name in _EXTRA if every and all(name in made for made in every)]
    on_base = any(made["base_bytes"] for made in every)
    header = ["", "seconds", *([f"÷ {reference}"] if reference else [])]
    header += ["peak memory, GB", "above the base, GB"] if on_base else []
    header += [_EXTRA[name][0] for name in extra]
    rows = []
    for name in result["rounds"]:
        row = [name, Figure.of(values(result, name)).text()]
        if reference:
            row.append(ratios(result, name, reference).text() if name != reference else "1")
        if on_base:
            peak = max(values(result, name, "peak_bytes"))
            row += [_digits(peak / 1e9), _digits((peak - min(values(result, name, "base_bytes"))) / 1e9)]
        row += [_EXTRA[column][1](median(values(result, name, column))) for column in extra]
        rows.append(row)
    return table(header, rows)


def _points(result: Result) -> list[str]:
    """Memory against the number of adapters."""
    lines: list[str] = []
    for rounds in result["rounds"].values():
        size = rounds[0]["parameter_bytes"]
        rows = []
        for index, point in enumerate(rounds[0]["points"]):
            before = rounds[0]["points"][max(index - 1, 0)]["adapters"]
            grown = [made["points"][index]["bytes"] - made["points"][max(index - 1, 0)]["bytes"] for made in rounds]
            rows.append(
                [
                    f"{point['adapters']:,}",
                    f"{size * point['adapters'] / 1e6:,.1f}",
                    Figure.of(made["points"][index]["bytes"] / 1e6 for made in rounds).text(),
                    Figure.of(one / (point["adapters"] - before) / size for one in grown).text() if index else "",
                    _digits(median(made["points"][index]["loading_seconds"] for made in rounds)),
                ]
            )
        header = ["adapters", "their parameters, MB", "memory, MB", "one ÷ its parameters", "loaded, s"]
        lines += [f"An adapter's parameters are {size:,} bytes.", "", *table(header, rows)]
    return lines


_EXTRA = {
    "before_first_step_seconds": ("before the first step, s", _digits),
    "new_tokens": ("new tokens", "{:,.0f}".format),
    "batches": ("batches", "{:,.0f}".format),
}

_SHAPES = "\n".join(f"- `{name}`: {SHAPES[name]}" for name in ("sketch", "llama-1b"))
_SKETCH = AMOUNTS["cpu", "sketch"]

_ABOUT = f"""
# Speed and memory

Written by `python -m benchmarks` from the rounds recorded in `benchmarks/results/`; one machine's run replaces its own
part of this page. The systems of a table were measured in the same run and in turns, A B A B …, each in a process of
its own that sleeps while another is measured (at `llama-1b` on a CPU a process is started for each round, since several
do not fit into memory). Every system has all cores, the same base, examples, batch size and dtype, and no gradient
checkpointing. A number is the median of the rounds with the least and the most; a ratio is taken round by round. Before
the first round a process runs one that does not count (at `llama-1b` on a CPU: on short inputs). Memory is the most
that the process ever held: resident on a CPU, the interpreter and the libraries included, allocated on a GPU; *above
the base* is what came on top of what it held with the base loaded.

The bases have random weights, and run as fast as trained ones:

{_SHAPES}

Lengths are real ones, those of questions on passages of SQuAD (xquad.en) as a tokenizer trained on them counts
(`benchmarks/lengths.py`); the tokens are random.
"""

_PARTS = {
    "step": (
        "A training step",
        f"{STEP_ROWS} rows with {VIRTUAL} virtual tokens: 208 tokens of prompt and 8 of answer each (*equal lengths*), "
        "or as real passages have them. Ours is the forward pass with its loss, the backward pass and the optimizer's "
        f"step. The {LIMIT} is the least that a method with a prompt for each row must do: the frozen decoder, forward "
        "and backward to its input embeddings, on exactly the rows' real and virtual positions and no padding; it has "
        "no head, no loss, no prompt and no optimizer. The fastest way of running the rows is the limit; `packed` puts "
        "them behind one another in one row, with their attention kept apart.",
    ),
    "epoch": (
        "An epoch of training",
        f"{_SKETCH.examples} examples on `sketch` and {AMOUNTS['cpu', 'llama-1b'].examples} on `llama-1b` on a CPU, "
        f"{AMOUNTS['cuda', 'llama-1b'].examples} on a GPU, in one shuffled order for all, eight a step; "
        f"{VIRTUAL} virtual tokens, LoRA with r = 1 on `q_proj` and `v_proj`. From the beginning of the first step to "
        "the end of the last. Batches are right-padded; nothing is evaluated, logged or saved. What a trainer does "
        "*before the first step* is shown beside it and counted in neither: for `ptmoe pt-moe` that is one pass over "
        "the examples, at most 512 of a data set, from whose gradients the routing starts. `Trainer` and "
        "`SFTTrainer` have their defaults but for the settings above; of `SFTTrainer`'s, gradient checkpointing and "
        "bfloat16 autocast are off, as they are for all.",
    ),
    "generate": (
        "Completions",
        f"Greedy, {_SKETCH.new_tokens} new tokens at most, of prompts of real lengths. A batch holds at most so many "
        "places, rows · (longest prompt + virtual + new): "
        f"{_SKETCH.places:,} on `sketch` and {AMOUNTS['cpu', 'llama-1b'].places:,} on `llama-1b` on a CPU, "
        f"{AMOUNTS['cuda', 'llama-1b'].places:,} on a GPU, and is filled as far as they allow on both sides. ptmoe's "
        "prompts are sorted by length, as `ptmoe eval` does; peft's come in their own order, and sorted in a row of "
        "their own. *Answers end*: each where the recorded one of its prompt does, with the end token that it is given "
        "there on all sides; *new tokens* shows how many there were. Turning tokens into text is on no side. "
        "The final norm is scaled so that logits have a standard deviation of 4.5: random weights put the best two "
        "tokens far closer than trained ones do, and in float32 ptmoe looks at a row with a near tie alone.",
    ),
    "adapters": (
        "Memory of many adapters",
        f"pt-moe adapters ({VIRTUAL} virtual tokens, 2 experts, rank 36) loaded from a folder onto one base. *One* is "
        "what the process has grown by since the row before, for each adapter; the goal is about the last row.",
    ),
    "curves": (
        "What a step costs",
        f"The time and memory of a training step of pt-moe, {STEP_ROWS} rows of 216 real tokens, 8 of them supervised, "
        f"{VIRTUAL} virtual tokens, two experts, but for what the table varies.",
    ),
    "linear": (
        "Linear layers",
        "One frozen layer by itself, as `torch` computes it on a CPU and by oneDNN, which `ptmoe.fast.linear` calls in "
        "float32: the projection to the vocabulary (*the head*) or a layer's up projection, on 13 rows as in "
        "*decoding*, or on 64 of the head and 2,048 of a layer in *training*, there with the backward pass to the "
        "layer's input.",
    ),
    "head": (
        "The first scores",
        "The frozen projection to the vocabulary at the last position of each row of a batch, from which the first new "
        "token is chosen: from a view of the hidden states of all positions, with *gaps* between its rows, as "
        "`transformers` hands it on, and from one that is *copied*, as `ptmoe.fast.linear` has it.",
    ),
    "attention": (
        "Attention",
        "The causal attention of one layer by itself, forward and backward, by `torch`'s own kernel on a CPU and by "
        "the plain products that `ptmoe.fast.attention` calls for rows of up to 512 tokens in bfloat16.",
    ),
    "startup": (
        "Start-up",
        "A new interpreter, from its start to its end, the files in memory: the median of five in each round.",
    ),
    "study": (
        "A study",
        "`ptmoe compare` as a command, from its start to the end of its report: seeds of `pt`, as many cells at once "
        "as there are cores, in processes and on Ray (`--on ray`), which each command starts and ends.",
    ),
}
