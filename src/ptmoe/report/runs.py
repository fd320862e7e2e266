"""Finished run folders as typed values; reading them needs no torch.

RUN/config.yaml  environment.json  result.json      required
RUN/metrics.jsonl  eval/TASK.json                   where the run trained, and where it was evaluated
RUN/routing/nearest.json                            where `ptmoe inspect` looked for the virtual tokens' nearest words
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ptmoe.errors import PtmoeError
from ptmoe.train.recipe import Result

COLLAPSED_SHARE = 0.95  # of the inputs on one expert

T = TypeVar("T")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True)
class Environment:
    """`environment.json`: what the run ran on. A version is None for a package that was not installed."""

    versions: dict[str, str | None]
    hardware: dict[str, Any]
    commit: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Log:
    """One line of `metrics.jsonl`; what it does not hold is None.

    Attributes:
        step: optimiser steps done.
        seconds: since training began.
        loss: mean over the supervised tokens since the line before.
        learning_rate: of the optimiser.
        grad_norm: before clipping.
        expert_use: the share of the training inputs that went to each expert, `(N,)`.
        routing_confidence: mean of the router's largest probability.
        hardness: of the gate, 0 soft, 1 the chosen gate.
    """

    step: int | None = None
    seconds: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    expert_use: list[float] | None = None
    routing_confidence: float | None = None
    hardness: float | None = None


@dataclass(frozen=True)
class Part:
    """The inputs of one domain and their scores in percent: those of the task's metrics."""

    examples: int
    accuracy: float | None = None
    exact_match: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class Routing:
    """How a task's inputs were routed; `N` is `num_experts`.

    Attributes:
        num_experts: `N`.
        use: of each domain, the share of its inputs whose largest gate is each expert's, `(N,)`.
        mean_gate: of each domain, the mean gate of each expert, `(N,)`.
        entropy: of the use over all inputs, in nats.
        mutual_information: of expert and domain, in nats.
        prompt_similarity: cosine of every pair of expert prompts, `(N, N)`.
    """

    num_experts: int
    use: dict[str, list[float]]
    mean_gate: dict[str, list[float]]
    entropy: float
    mutual_information: float
    prompt_similarity: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if self.num_experts < 1 or not self.use:
            raise ValueError("routing needs an expert and a domain at least")
        square = self.prompt_similarity or []
        if square and len(square) != self.num_experts:
            raise ValueError(f"prompt_similarity has {len(square)} rows for num_experts={self.num_experts}")
        for row in (*self.use.values(), *self.mean_gate.values(), *square):
            if len(row) != self.num_experts:
                raise ValueError(f"a row of routing has {len(row)} values for num_experts={self.num_experts}")
        if self.use.keys() != self.mean_gate.keys():
            raise ValueError("use and mean_gate have different domains")


@dataclass(frozen=True)
class Evaluation:
    """`eval/TASK.json`: scores in percent, `interval` the 95 % interval of each; `metric` ranks the runs.

    `mean_of_domains` is the plain mean of the domains' scores, which is the form of SVAMP's figure in PT-MoE's paper.
    """

    task: str
    examples: int
    metrics: dict[str, float]
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    by_domain: dict[str, Part] = field(default_factory=dict)
    routing: Routing | None = None
    seconds: float | None = None
    metric: str = "accuracy"
    mean_of_domains: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scores in (self.metrics, *(vars(part) for part in self.by_domain.values())):
            if scores.get(self.metric) is None:
                raise ValueError(f"metrics has no {self.metric}")

    @property
    def score(self) -> float:
        """Of the ranking metric, in percent, over all examples."""
        return self.metrics[self.metric]

    @property
    def score_interval(self) -> tuple[float, float] | None:
        """Its 95 % interval, in percent."""
        return self.interval.get(self.metric)

    def domain_score(self, domain: str) -> float | None:
        """In percent, over the examples of a domain; None where there are none."""
        part = self.by_domain.get(domain)
        return None if part is None else float(getattr(part, self.metric))


@dataclass(frozen=True)
class NearestTokens:
    """`routing/nearest.json`: of each expert, of each of its virtual tokens, the nearest words of the base's vocabulary
    with their cosines, the nearest first (`ptmoe.report.vocabulary.nearest_tokens`); no expert where a method has no
    virtual tokens."""

    experts: list[list[list[tuple[str, float]]]]

    def __post_init__(self) -> None:
        if len({len(tokens) for tokens in self.experts}) > 1:
            raise ValueError("experts needs as many virtual tokens for each")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it was read from.
        config: `config.yaml`, the resolved options.
        result: what it was and took.
        environment: what it ran on.
        logs: of its training, in order; empty where nothing was trained.
        evaluations: by task.
        predictions: by task, the file that holds them, if it was written.
        nearest: words to the virtual tokens, where they were looked for.
    """

    folder: Path
    config: dict[str, Any]
    result: Result
    environment: Environment
    logs: tuple[Log, ...] = ()
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    predictions: dict[str, Path] = field(default_factory=dict)
    nearest: NearestTokens | None = None

    @property
    def method(self) -> str:
        return self.result.method

    @property
    def selective(self) -> bool:
        """Whether an input goes to one expert only."""
        default = self.method != "attempt"  # whose attention is soft and has no such option
        return bool(self.config["method"].get("selective", default))

    def shares(self, task: str) -> dict[str, list[float]]:
        """The share of each domain that each expert takes, `(N,)`; empty where the task was not routed.

        Of the inputs with a selective gate; of the gate without one, since its largest entry then decides nothing.
        """
        evaluation = self.evaluations.get(task)
        if evaluation is None or evaluation.routing is None:
            return {}
        if self.selective:
            return evaluation.routing.use
        gates = evaluation.routing.mean_gate
        return {domain: [value / (sum(gate) or 1.0) for value in gate] for domain, gate in gates.items()}

    def overall_shares(self, task: str) -> list[float]:
        """`shares` over all inputs of the task, `(N,)`."""
        shares = self.shares(task)
        if not shares:
            return []
        evaluation = self.evaluations[task]
        parts = evaluation.by_domain
        without_domain = evaluation.examples - sum(part.examples for part in parts.values())
        counts = {domain: parts[domain].examples if domain in parts else without_domain for domain in shares}
        total = sum(counts.values()) or 1
        return [
            sum(counts[domain] * share for domain, share in zip(shares, column, strict=True)) / total
            for column in zip(*shares.values(), strict=True)
        ]

    def collapsed_expert(self, task: str) -> int | None:
        """The expert that takes at least 95 % of the task, of several; None where there is none."""
        shares = self.overall_shares(task)
        if len(shares) < 2 or max(shares) < COLLAPSED_SHARE:
            return None
        return shares.index(max(shares))


def read_run(folder: str | Path) -> Run:
    """Read one run folder.

    Raises:
        PtmoeError: a file is missing, damaged or lacks something; it and what is wrong are named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PtmoeError(f"{folder} is not a folder: give a run folder")
    for name in ("result.json", "config.yaml", "environment.json"):
        if not (folder / name).is_file():
            raise PtmoeError(f"{folder / name} is missing: {folder} is not the folder of a finished run")
    evaluations: dict[str, Evaluation] = {}
    predictions: dict[str, Path] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        evaluation = parse(Evaluation, path)
        evaluations[evaluation.task] = evaluation
        predictions[evaluation.task] = folder / "predictions" / f"{path.stem}.jsonl"
    words = folder / "routing" / "nearest.json"
    return Run(
        folder=folder,
        config=_config(folder / "config.yaml"),
        result=parse(Result, folder / "result.json"),
        environment=parse(Environment, folder / "environment.json"),
        logs=tuple(parse_lines(Log, metrics)) if (metrics := folder / "metrics.jsonl").exists() else (),
        evaluations=evaluations,
        predictions=predictions,
        nearest=parse(NearestTokens, words) if words.is_file() else None,
    )


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read run folders; of a folder that holds run folders, those that are finished, by name.

    Raises:
        PtmoeError: a run folder cannot be read, or there is no finished run.
    """
    places = [Path(folder) for folder in folders]
    found: list[Path] = []
    for folder in places:
        if not folder.is_dir():
            raise PtmoeError(f"{folder} is not a folder: give a run folder, or one that holds run folders")
        inner = sorted(path.parent for path in folder.glob("*/result.json"))
        is_run = any((folder / name).exists() for name in ("result.json", "config.yaml"))
        found += [folder] if is_run else inner
    if not found:
        named = ", ".join(map(str, places)) or "no folder"
        raise PtmoeError(f"no finished run in {named}: a finished run has a result.json")
    return [read_run(folder) for folder in dict.fromkeys(found)]


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other has: its own, with the folder's where two runs share one."""
    names = Counter(run.result.name for run in runs)
    placed = []
    for run in runs:
        name, folder = run.result.name, run.folder.resolve().name
        placed.append(name if names[name] == 1 or folder == name else f"{name} ({folder})")
    seen = Counter(placed)
    return [label if seen[label] == 1 else f"{label} #{index + 1}" for index, label in enumerate(placed)]


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """The tasks that any run was evaluated on, in the order they are met."""
    return list(dict.fromkeys(task for run in runs for task in run.evaluations))


def metric_of(runs: Iterable[Run], task: str) -> str:
    """The metric that a task's runs are ranked by."""
    return next((run.evaluations[task].metric for run in runs if task in run.evaluations), "accuracy")


def domains_of(runs: Iterable[Run], task: str) -> list[str]:
    """The domains of a task that any run has a score for, in the order they are met."""
    evaluated = (run.evaluations[task] for run in runs if task in run.evaluations)
    return list(dict.fromkeys(domain for evaluation in evaluated for domain in evaluation.by_domain))


def parse(kind: type[T], path: Path) -> T:
    """A JSON file as a typed value.

    Raises:
        PtmoeError: it cannot be read, is damaged or lacks something; it and what is wrong are named.
    """
    try:
        value: T = _adapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise PtmoeError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise PtmoeError(f"{path}: {_problems(error)}") from None
    return value


def parse_lines(kind: type[T], path: Path) -> list[T]:
    """The lines of a JSON-lines file, each as a typed value; empty lines are passed over.

    Raises:
        PtmoeError: as `parse`, with the line's number.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise PtmoeError(f"{path}: {error.strerror}") from None
    adapter, values = _adapter(kind), []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values.append(adapter.validate_json(line))
        except ValidationError as error:
            raise PtmoeError(f"{path}, line {number}: {_problems(error)}") from None
    return values


def yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds keys and values.

    Raises:
        PtmoeError: it is not one.
    """
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PtmoeError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path}: holds {type(written).__name__}, needs keys and values")
    return written


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each type, since that takes longer than reading most files."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def _config(path: Path) -> dict[str, Any]:
    config = yaml_mapping(path)
    method = config.get("method")
    if not isinstance(method, dict) or "name" not in method:
        raise PtmoeError(f"{path}: method.name is missing")
    return config


def _problems(error: ValidationError) -> str:
    said = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            said.append(f"{key} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            said.append(f"{key}: {message}" if key else message)
    return "; ".join(said)
