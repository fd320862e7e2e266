"""Tables of what runs say about routing: how evenly experts are used, by which domain, how alike they are, and near
which words their virtual tokens lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ptmoe.report.frame import Entry, Frame, Row, decimal, rows, text, whole
from ptmoe.report.runs import Routing, Run

COLUMNS = ("method", "trained on", "seed")


@dataclass(frozen=True)
class Routed:
    """A run, and what a report calls it.

    Attributes:
        label: its method, with its size where there are several.
        trained_on: a task, or a file.
        seed: of the training.
        run: its folder's contents.
        title: in a figure's title.
        one_of_several: whether there are runs that differ in the seed only.
    """

    label: str
    trained_on: str
    seed: int | None
    run: Run
    title: str
    one_of_several: bool = False

    @property
    def seed_note(self) -> str:
        return f"seed {self.seed}" if self.one_of_several else ""

    @property
    def prompt_similarity(self) -> list[list[float]]:
        """Cosine of every pair of expert prompts, `(N, N)`, the same for all tasks; empty where there is none."""
        return next((routing.prompt_similarity for _, routing in self.routings() if routing.prompt_similarity), [])

    def named(self) -> list[Entry]:
        seed = Entry(self.seed, "–" if self.seed is None else str(self.seed))
        return [text(self.label), text(self.trained_on), seed]

    def routings(self) -> Iterator[tuple[str, Routing]]:
        """Of each task that it was evaluated on and routed."""
        for task, evaluation in self.run.evaluations.items():
            if evaluation.routing is not None:
                yield task, evaluation.routing


def routing_table(routed: Sequence[Routed]) -> Frame:
    """A row for each run and task: entropy, mutual information, and the largest share."""
    lines = []
    for one in routed:
        for task, routing in one.routings():
            share = max(one.run.overall_shares(task))
            collapsed = one.run.collapsed_expert(task) is not None
            lines.append(
                [
                    *one.named(),
                    text(task),
                    whole(routing.num_experts),
                    decimal(routing.entropy, 2),
                    decimal(math.exp(routing.entropy), 2),
                    decimal(routing.mutual_information, 2),
                    decimal(100 * share),
                    text("yes" if collapsed else "no"),
                ]
            )
    return Frame(
        "routing",
        "Routing of every seed",
        (
            *COLUMNS,
            "task",
            "experts",
            "entropy, nats",
            "effective experts",
            "mutual information, nats",
            "largest share, %",
            "collapsed",
        ),
        rows(lines),
        "Entropy is of the experts’ use over all inputs of the task, and its exponential the number of experts that "
        "are effectively in use. Mutual information is of expert and domain: 0 where the expert says nothing about the "
        "domain. Collapsed: one of several experts takes at least 95 %.",
    )


def expert_use_table(routed: Sequence[Routed]) -> Frame:
    """A row for each run, task, domain and expert."""
    lines = [
        [
            *one.named(),
            text(task),
            text(domain),
            whole(expert),
            decimal(100 * routing.use[domain][expert]),
            decimal(routing.mean_gate[domain][expert], 3),
        ]
        for one in routed
        for task, routing in one.routings()
        for domain in routing.use
        for expert in range(routing.num_experts)
    ]
    return Frame(
        "expert-use",
        "Expert use by domain",
        (*COLUMNS, "task", "domain", "expert", "inputs, %", "mean gate"),
        rows(lines),
        "The share of a domain’s inputs whose largest gate is the expert’s, and the mean of its gate.",
    )


def training_table(routed: Sequence[Routed]) -> Frame:
    """A row for each run, logged step and expert."""
    lines = [
        [
            *one.named(),
            whole(log.step),
            whole(expert),
            decimal(100 * share),
            decimal(log.routing_confidence, 3),
            decimal(log.hardness, 3),
        ]
        for one in routed
        for log in one.run.logs
        if log.step is not None
        for expert, share in enumerate(log.expert_use or ())
    ]
    return Frame(
        "routing-over-training",
        "Routing over training",
        (*COLUMNS, "step", "expert", "inputs, %", "routing confidence", "hardness"),
        rows(lines),
        "The share of the training inputs that an expert took since the step before, the mean of the router’s largest "
        "probability, and how far the gate had hardened.",
    )


def similarity_table(routed: Sequence[Routed]) -> Frame:
    """A row for each run and pair of experts."""
    lines = []
    for one in routed:
        square = one.prompt_similarity
        lines += [
            [*one.named(), whole(first), whole(second), decimal(square[first][second], 3)]
            for first in range(len(square))
            for second in range(first)
        ]
    return Frame(
        "prompt-similarity",
        "Similarity of the experts’ prompts",
        (*COLUMNS, "expert", "other expert", "cosine"),
        rows(lines),
    )


def nearest_words(one: Routed) -> Frame | None:
    """A row for each virtual token of a run, a column for each expert; None where nobody looked for the words."""
    nearest = one.run.nearest
    if nearest is None or not nearest.experts:
        return None
    columns = [f"expert {expert}" for expert in range(len(nearest.experts))] if len(nearest.experts) > 1 else ["words"]
    lines = [
        Row(
            (
                Entry(place, str(place)),
                *(text(" · ".join(f"{_visible(word)} {cosine:.2f}" for word, cosine in words)) for words in tokens),
            )
        )
        for place, tokens in enumerate(zip(*nearest.experts, strict=True), start=1)
    ]
    return Frame(
        f"nearest words of {one.title}",
        f"Nearest words of the virtual tokens of {one.title}{f', {one.seed_note}' if one.seed_note else ''}",
        ("virtual token", *columns),
        tuple(lines),
        "The words of the base’s vocabulary with the highest cosine to each virtual token; a space is shown as ␣.",
    )


def nearest_table(routed: Sequence[Routed]) -> Frame:
    """A row for each run, expert, virtual token and word."""
    lines = [
        [*one.named(), whole(expert), whole(place), whole(rank), text(word), decimal(cosine, 3)]
        for one in routed
        if one.run.nearest is not None
        for expert, tokens in enumerate(one.run.nearest.experts)
        for place, words in enumerate(tokens, start=1)
        for rank, (word, cosine) in enumerate(words, start=1)
    ]
    return Frame(
        "nearest-words",
        "Nearest words of the virtual tokens",
        (*COLUMNS, "expert", "virtual token", "rank", "word", "cosine"),
        rows(lines),
    )


def _visible(word: str) -> str:
    return word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"
