"""The part of a report's page on routing: which expert each input went to, after training and over it, and what the
experts' prompts are like.

Experts of different seeds have nothing to do with each other, so nothing is averaged over seeds: the first seed is
drawn, and the tables have all.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from ptmoe.report import figures
from ptmoe.report.comparison import Cell, Comparison
from ptmoe.report.gallery import Gallery, Picture, Section
from ptmoe.report.table import Table, decimals
from ptmoe.runs.records import EvaluationSummary, LogLine, RoutingSummary

FORMATS = dict.fromkeys(("entropy, nats", "effective experts", "mutual information, nats"), decimals(2))
FORMATS |= dict.fromkeys(("cosine", "mean gate", "routing confidence", "hardness"), decimals(3))
Rows = Iterator[dict[str, Any]]


class Drawn(NamedTuple):
    """The first seed of a label and task, what figures call it, and a note that says which seed it is of several."""

    cell: Cell
    title: str
    note: str


def routing_sections(comparison: Comparison, gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for; none for methods that do not route."""
    first = list({(cell.label, cell.task): cell for cell in reversed(comparison.cells)}.values())[::-1]
    drawn = []
    for cell in first:
        title = f"{cell.label} trained on {cell.task}" if len(comparison.tasks) > 1 else cell.label
        drawn.append(Drawn(cell, title, f"seed {cell.seed}" if len(comparison.of(cell.label, cell.task)) > 1 else ""))

    def table(name: str, title: str, rows: Callable[[Cell], Rows], note: str = "", place: Any = "download") -> Table:
        found = [
            {"method": cell.label, "trained on": cell.task, "seed": cell.seed} | row
            for cell in comparison.cells
            for row in rows(cell)
        ]
        return Table(name, title, pd.DataFrame(found, dtype=object), note, formats=FORMATS, place=place)

    if maps := [picture for run in drawn for picture in _maps(run, gallery)]:
        summary = (
            "Entropy is of the experts’ use over all inputs of the task, and its exponential the number of experts "
            "that are effectively in use. Mutual information is of expert and domain: 0 where the expert says nothing "
            "about the domain. Collapsed: one of several experts takes at least 95 %."
        )
        use = "The share of a domain’s inputs whose largest gate is the expert’s, and the mean of its gate."
        yield Section(
            "Routing: which expert each domain went to",
            "The share of the inputs that each expert takes (of the gate, for a method that mixes all experts). Mutual "
            "information is 0 where the expert says nothing about the domain. Experts of different seeds have nothing "
            "to do with each other, so each map is of one seed, and the table has all.",
            [
                table("routing", "Routing of every seed", _summaries, summary, "folded"),
                table("expert-use", "Expert use by domain", _expert_use, use),
            ],
            maps,
        )
    if similar := [_similarity_map(run, gallery) for run in drawn if len(_similarity(run.cell)) > 1]:
        yield Section(
            "Similarity of the experts’ prompts",
            "Cosine of every pair; 1 is the same direction, 0 none in common.",
            [table("prompt-similarity", "Similarity of the experts’ prompts", _similarity_pairs)],
            similar,
        )
    trained = []
    for cell, title, note in drawn:
        if logs := _routed_logs(cell):
            alt = {f"{title} by optimiser step": "expert use and routing confidence"}
            name = f"routing of {title} over training"
            trained.append(gallery.picture(name, figures.routing_over_training, logs, alt=alt, note=note))
    if trained:
        note = (
            "The share of the training inputs that an expert took since the step before, the mean of the router’s "
            "largest probability, and how far the gate had hardened."
        )
        yield Section(
            "Routing over training",
            "Top: the share of the training inputs that each expert took. Bottom: the router’s confidence, the mean of "
            "its largest probability, and how far the gate has hardened from all experts to the chosen one.",
            [table("routing-over-training", "Routing over training", _training, note)],
            trained,
        )
    if words := [_words_table(run) for run in drawn if run.cell.run.nearest and run.cell.run.nearest.experts]:
        yield Section(
            "What the virtual tokens lie near",
            "The words of the base’s vocabulary with the highest cosine. A soft prompt need not lie near any word: a "
            "cosine near 0 says that it does not.",
            [*words, table("nearest-words", "Nearest words of the virtual tokens", _nearest)],
        )


def _routings(cell: Cell) -> Iterator[tuple[str, EvaluationSummary, RoutingSummary]]:
    """Of each task that the cell was evaluated on and routed."""
    for task, summary in cell.run.evaluations.items():
        if summary.routing is not None:
            yield task, summary, summary.routing


def _summaries(cell: Cell) -> Rows:
    for task, summary, routing in _routings(cell):
        yield {
            "task": task,
            "experts": routing.num_experts,
            "entropy, nats": routing.entropy,
            "effective experts": math.exp(routing.entropy),
            "mutual information, nats": routing.mutual_information,
            "largest share, %": 100 * max(summary.overall_shares),
            "collapsed": "no" if summary.collapsed_expert is None else "yes",
        }


def _expert_use(cell: Cell) -> Rows:
    for task, _, routing in _routings(cell):
        for domain, use in routing.use.items():
            for expert, (share, gate) in enumerate(zip(use, routing.mean_gate[domain], strict=True)):
                row = {"task": task, "domain": domain, "expert": expert}
                yield row | {"inputs, %": 100 * share, "mean gate": gate}


def _maps(run: Drawn, gallery: Gallery) -> Iterator[Picture]:
    """By task, where there are several, and by domain for each task that has them."""
    routings = [(task, summary, routing) for task, summary, routing in _routings(run.cell) if routing.num_experts > 1]
    maps: list[tuple[str, str, Mapping[str, Sequence[float]], str]] = []
    if len(routings) > 1:
        maps.append(
            (f"{run.title} by task", "task", {task: summary.overall_shares for task, summary, _ in routings}, "")
        )
    for task, _, routing in routings:
        if len(routings) == 1 or len(routing.use) > 1:
            note = f"mutual information {routing.mutual_information:.2f} nats, entropy {routing.entropy:.2f} nats"
            title = run.cell.label if task == run.cell.task else run.title
            maps.append((f"{title} on {task}", "domain", routing.shares, note))
    for title, of, shares, note in maps:
        alt = {
            domain or "all": ", ".join(f"expert {expert} {share:.0%}" for expert, share in enumerate(row))
            for domain, row in shares.items()
        }
        notes = "; ".join(filter(None, [run.note, note]))
        yield gallery.picture(f"routing of {title}", figures.routing_heat_map, shares, of, alt=alt, note=notes)


def _similarity(cell: Cell) -> list[list[float]]:
    """Cosine of every pair of expert prompts, `(N, N)`, the same for all tasks; empty where there is none."""
    return next((routing.prompt_similarity for *_, routing in _routings(cell) if routing.prompt_similarity), [])


def _similarity_map(run: Drawn, gallery: Gallery) -> Picture:
    square = _similarity(run.cell)
    alt = {f"expert {index}": ", ".join(f"{value:.2f}" for value in row) for index, row in enumerate(square)}
    title = f"prompt similarity of {run.title}"
    return gallery.picture(title, figures.similarity_heat_map, square, alt=alt, note=run.note)


def _similarity_pairs(cell: Cell) -> Rows:
    for first, row in enumerate(_similarity(cell)):
        for second in range(first):
            yield {"expert": first, "other expert": second, "cosine": row[second]}


def _routed_logs(cell: Cell) -> list[LogLine]:
    return [log for log in cell.run.logs if log.step is not None and log.expert_use]


def _training(cell: Cell) -> Rows:
    for log in _routed_logs(cell):
        for expert, share in enumerate(log.expert_use or ()):
            row = {"step": log.step, "expert": expert, "inputs, %": 100 * share}
            yield row | {"routing confidence": log.routing_confidence, "hardness": log.hardness}


def _nearest(cell: Cell) -> Rows:
    for expert, tokens in enumerate(cell.run.nearest.experts if cell.run.nearest else ()):
        for place, nearest in enumerate(tokens, start=1):
            for rank, (word, cosine) in enumerate(nearest, start=1):
                yield {"expert": expert, "virtual token": place, "rank": rank, "word": word, "cosine": cosine}


def _words_table(run: Drawn) -> Table:
    """A row for each virtual token, a column for each expert."""
    experts = run.cell.run.nearest.experts if run.cell.run.nearest else []
    names = [f"expert {expert}" for expert in range(len(experts))] if len(experts) > 1 else ["words"]
    rows = [
        [place, *(" · ".join(f"{_visible(word)} {cosine:.2f}" for word, cosine in words) for words in tokens)]
        for place, tokens in enumerate(zip(*experts, strict=True), start=1)
    ]
    return Table(
        f"nearest words of {run.title}",
        f"Nearest words of the virtual tokens of {', '.join(filter(None, [run.title, run.note]))}",
        pd.DataFrame(rows, columns=["virtual token", *names], dtype=object),
        "The words of the base’s vocabulary with the highest cosine to each virtual token; a space is shown as ␣.",
        place="folded",
    )


def _visible(word: str) -> str:
    return word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"
