"""What a search tried and found, as records: trials of `ptmoe tune`, and a comparison's search for learning rates."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ptmoe.errors import PtmoeError
from ptmoe.runs.records import EvaluationSummary, Record
from ptmoe.settings import differences

State: TypeAlias = Literal["finished", "stopped", "diverged", "failed"]


def mean_score(evaluations: Iterable[EvaluationSummary]) -> float:
    """What a trial is judged by: the plain mean over its tasks, in percent."""
    scores = [evaluation.score for evaluation in evaluations]
    return sum(scores) / len(scores)


class TrialRecord(Record):
    """A trial of a search that ended."""

    number: int  # in the order in which they are drawn
    settings: dict[str, Any]  # that differ from the search's own
    scores: list[tuple[int, float]]  # the steps after which it was validated, and the scores, in percent
    # Whether it trained to its end, was stopped before because others did better, or failed; of a learning rate with
    # which the loss becomes NaN, that it diverged.
    state: State
    error: str | None = None  # why it failed or diverged
    data: str | None = None  # a fingerprint of the examples that it was trained and scored on; None in older searches
    plan: dict[str, Any] | None = None  # of `ptmoe tune`, what its search was like; None in older searches


def check_data(trials: Iterable[TrialRecord], data: str, folder: Path, source: str) -> None:
    """
    Args:
        trials: of the search in `folder`, that have ended.
        data: the fingerprint of the examples that others would be trained and scored on, which are of `source`.

    Raises:
        PtmoeError: one had other examples.
    """
    if any(trial.data not in (None, data) for trial in trials):
        raise PtmoeError(
            f"{folder} holds a search on other data than {source} holds now, whose scores do not compare: put the data "
            "back, or choose another --output-dir"
        )


class RateSearch(Record):
    """The search for one learning rate of a comparison: of a method at one size, trained on one task."""

    label: str  # of the cells that it is for
    method: str  # theirs
    task: str  # theirs
    split: str  # that scores are of: `validation`, or the part of `train` that no trial was trained on
    examples: int  # of it, at most
    given: float  # the learning rate as the plan has it, around which the others lie
    rates: list[float]  # the grid, the lowest first
    seeds: list[int]  # of the trials at each rate, which no cell has by default
    options: dict[str, Any] | None = None  # that all trials have; None in older searches
    trials: list[TrialRecord] = []  # those that have ended; their settings are `learning_rate` and `seed`
    chosen: float | None = None  # the learning rate of the cells; None until every trial has ended

    def differences(self, other: "RateSearch") -> list[str]:
        """In what its trials are made otherwise than those of another search, each as a sentence."""
        before, now = (
            each.model_dump(exclude={"trials", "chosen", "options"}) | ((self.options and each.options) or {})
            for each in (self, other)
        )
        return differences((name, value, now[name]) for name, value in before.items() if name in now)

    @property
    def scores(self) -> dict[float, list[float]]:
        """By rate, those of the trials that trained to their end, by seed."""
        trials = sorted(self.trials, key=lambda trial: trial.settings["seed"])
        return {
            rate: [t.scores[-1][1] for t in trials if t.settings["learning_rate"] == rate and t.state == "finished"]
            for rate in self.rates
        }

    @property
    def means(self) -> dict[float, float]:
        """The mean over seeds of each rate that trained to its end with all of them."""
        whole = {rate: scores for rate, scores in self.scores.items() if len(scores) == len(self.seeds)}
        return {rate: sum(scores) / len(scores) for rate, scores in whole.items()}

    @property
    def settled(self) -> set[tuple[float, int]]:
        """The rates and seeds that are not to be tried again."""
        ended = (trial for trial in self.trials if trial.state != "failed")
        return {(trial.settings["learning_rate"], trial.settings["seed"]) for trial in ended}

    @property
    def best(self) -> float | None:
        """The rate with the highest mean, of equal ones the lowest; None before all trials have ended, and where no
        rate has a mean."""
        ended = len(self.settled) == len(self.rates) * len(self.seeds)
        return max(self.means, key=self.means.__getitem__) if ended and self.means else None

    @property
    def edge(self) -> str | None:
        """Whether the chosen rate is the `lowest` or the `highest` of its grid, so that a better one may lie beyond."""
        ends = {self.rates[0]: "lowest", self.rates[-1]: "highest"}
        return None if self.chosen is None else ends.get(self.chosen)
