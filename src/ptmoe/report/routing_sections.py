"""The part of a page that says how runs routed: maps, similarities, training, and words near the virtual tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ptmoe.report.figures import Theme, routing_heat_map, routing_over_training, similarity_heat_map
from ptmoe.report.frame import decimal
from ptmoe.report.page import Gallery, Picture, Section
from ptmoe.report.routing_tables import (
    Routed,
    expert_use_table,
    nearest_table,
    nearest_words,
    routing_table,
    similarity_table,
    training_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ptmoe.report.runs import Run


def collapse(run: Run, task: str) -> str | None:
    """That a run's routing collapsed on a task, in words; None where it did not."""
    expert = run.collapsed_expert(task)
    if expert is None:
        return None
    shares = run.overall_shares(task)
    takes = "of the inputs" if run.selective else "of the gate"
    method = run.config["method"]
    off = [key for key in ("router_standardize", "routing_anneal") if method.get(key) is False]
    guard = f" Off in this run, and meant against it: {', '.join(off)}." if off else ""
    others = f"the other {len(shares) - 1} next to nothing"
    return f"expert {expert} takes {100 * shares[expert]:.1f} % {takes}, {others}.{guard}"


def routing_sections(runs: Sequence[Routed], shown: Sequence[Routed], gallery: Gallery) -> Iterator[Section]:
    """Each part that there is data for.

    Args:
        runs: in the tables.
        shown: those of them that are drawn. Experts of different seeds have nothing to do with each other, so seeds
            are not averaged: of several, the first is drawn.
        gallery: draws.
    """
    yield from _maps(runs, shown, gallery)
    yield from _similarities(runs, shown, gallery)
    logged = [one for one in shown if any(log.step is not None and log.expert_use for log in one.run.logs)]
    if logged:
        yield Section(
            "Routing over training",
            "Top: the share of the training inputs that each expert took. Bottom: the router’s confidence, the mean of "
            "its largest probability, and how far the gate has hardened from all experts to the chosen one.",
            pictures=[
                gallery.picture(
                    f"routing of {one.title} over training",
                    f"expert use and routing confidence of {one.title} by optimiser step",
                    _drawn(routing_over_training, one.run),
                    one.seed_note,
                )
                for one in logged
            ],
            numbers=[training_table(logged)],
        )
    tables = [table for one in shown if (table := nearest_words(one))]
    if tables:
        yield Section(
            "What the virtual tokens lie near",
            "The words of the base’s vocabulary with the highest cosine. A soft prompt need not lie near any word: a "
            "cosine near 0 says that it does not.",
            folded=tables,
            numbers=[nearest_table(runs)],
        )


def _maps(runs: Sequence[Routed], shown: Sequence[Routed], gallery: Gallery) -> Iterator[Section]:
    pictures: list[Picture] = []
    for one in shown:
        for where, shares, note in _shares(one):
            notes = "; ".join(filter(None, [one.seed_note, note]))
            said = _shares_in_words(shares)
            of = "task" if where == "by task" else "domain"
            title = one.label if where == f"on {one.trained_on}" else one.title
            pictures.append(
                gallery.picture(f"routing of {title} {where}", said, _drawn(routing_heat_map, shares, of=of), notes)
            )
    if pictures:
        yield Section(
            "Routing: which expert each domain went to",
            "The share of the inputs that each expert takes (of the gate, for a method that mixes all experts). Mutual "
            "information is 0 where the expert says nothing about the domain. Experts of different seeds have nothing "
            "to do with each other, so each map is of one seed, and the table has all.",
            pictures=pictures,
            folded=[routing_table(runs)],
            numbers=[expert_use_table(runs)],
        )


def _shares(one: Routed) -> Iterator[tuple[str, Mapping[str, Sequence[float]], str]]:
    """What the maps of a run show: its tasks, where there are several, and the domains of each that has them."""
    routings = [(task, routing) for task, routing in one.routings() if routing.num_experts > 1]
    if len(routings) > 1:
        yield "by task", {task: one.run.overall_shares(task) for task, _ in routings}, ""
    for task, routing in routings:
        if len(routings) == 1 or len(routing.use) > 1:
            information, entropy = (decimal(one, 2).text for one in (routing.mutual_information, routing.entropy))
            said = f"mutual information {information} nats, entropy {entropy} nats"
            yield f"on {task}", one.run.shares(task), said


def _similarities(runs: Sequence[Routed], shown: Sequence[Routed], gallery: Gallery) -> Iterator[Section]:
    alike = [(one, square) for one in shown if len(square := one.prompt_similarity) > 1]
    if alike:
        yield Section(
            "Similarity of the experts’ prompts",
            "Cosine of every pair; 1 is the same direction, 0 none in common.",
            pictures=[
                gallery.picture(
                    f"prompt similarity of {one.title}",
                    _similarity_in_words(square),
                    _drawn(similarity_heat_map, square),
                    one.seed_note,
                )
                for one, square in alike
            ],
            numbers=[similarity_table(runs)],
        )


def _drawn(figure: Callable[..., Figure], data: object, **options: object) -> Callable[[Theme], Figure]:
    return lambda theme: figure(data, theme=theme, **options)


def _shares_in_words(shares: Mapping[str, Sequence[float]]) -> str:
    return "; ".join(
        f"{domain or 'all'}: " + ", ".join(f"expert {expert} {share:.0%}" for expert, share in enumerate(row))
        for domain, row in shares.items()
    )


def _similarity_in_words(rows: Sequence[Sequence[float]]) -> str:
    return "; ".join(f"expert {index}: " + ", ".join(f"{value:.2f}" for value in row) for index, row in enumerate(rows))
