"""The records of run and comparison folders. Each knows how it is written and read, so the two cannot drift apart.

RUN/config.yaml                       `ptmoe.train.options.TrainOptions`; below `train`, a mapping
RUN/environment.json                  Environment
RUN/result.json                       Result
RUN/metrics.jsonl                     LogLine, one for each log of the training
RUN/adapter/  checkpoints/            the adapter folder; the checkpoints of `transformers`
RUN/eval/TASK.json                    EvaluationSummary
RUN/predictions/TASK.jsonl            Prediction, one for each answered example (`ptmoe.runs.predictions`)
RUN/inspect/nearest.json routing.json NearestWords, RoutingSummary
RUN/report.html  figures/  tables/
COMPARISON/comparison.yaml            `ptmoe.compare.plan.ComparePlan`; below `compare`, a mapping
COMPARISON/cells/LABEL/TASK/seed-N/   a run folder, and cell.json: CellRecord, written last
COMPARISON/failed.jsonl               Failure, one for each cell that failed when it was last run
COMPARISON/search.jsonl               RateSearch (`ptmoe.runs.searches`), one for each method, size and task
SEARCH/tune.yaml                      `ptmoe.compare.search.TunePlan`
SEARCH/trials.jsonl                   TrialRecord (`ptmoe.runs.searches`), one for each trial that ended
SEARCH/best.yaml                      the best trial's `TrainOptions`

A key that a folder written earlier lacks gets its default, and a key that is not known is ignored.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.files import append, write_whole

COLLAPSED_SHARE = 0.95  # of the inputs on one expert
OLD_FOLDER = "if an earlier version of ptmoe wrote it, evaluate or train again with this one"


class Record(BaseModel):
    """A JSON file, or a line of a JSON-lines file."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            PtmoeError: the file cannot be read, is damaged or lacks a key; the message names it and what is wrong.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PtmoeError(f"{path}: {error.strerror}") from None
        except ValidationError as error:
            raise PtmoeError(f"{path}: {_problems(error)} ({OLD_FOLDER})") from None

    @classmethod
    def read_lines(cls, path: Path) -> list[Self]:
        """The records of a JSON-lines file, none where it is not there; empty lines and half of a last one are skipped.

        Raises:
            PtmoeError: as `read`, with the number of the line.
        """
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PtmoeError(f"{path}: {error.strerror}") from None
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records += [cls.model_validate_json(line)] if line.strip() else []
            except ValidationError as error:
                if not line.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid":
                    break
                raise PtmoeError(f"{path}, line {number}: {_problems(error)} ({OLD_FOLDER})") from None
        return records

    def write(self, path: Path) -> None:
        """The file is there as it was or as it is to be, whenever the process is killed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n")

    def line(self) -> str:
        """As a line of a JSON-lines file; keys that were not set are left out."""
        return json.dumps(self.model_dump(exclude_unset=True), ensure_ascii=False) + "\n"


def write_lines(path: Path, records: Iterable[Record]) -> None:
    write_whole(path, "".join(record.line() for record in records))


def append_line(path: Path, record: Record) -> None:
    append(path, record.line().encode())


class Change(Record):
    """What a resumed run does otherwise than before, by force or because it runs elsewhere: from `step` on, each of
    its `differences` by name, the value before and the value since."""

    step: int
    differences: dict[str, tuple[Any, Any]]


class Environment(Record):
    """What a run ran on. A version is None for a package that was not installed."""

    versions: dict[str, str | None]
    commit: str | None = None
    seed: int | None = None
    hardware: dict[str, Any]
    fast_paths: dict[str, str | None] | None = None  # why each of `ptmoe.fast`'s was not used; None where it was
    base: str | None = None  # a fingerprint of its embedding before any training; None in runs of earlier versions
    data: str | None = None  # a fingerprint of the tokens that the run was trained on; None where nothing was trained
    # Of the examples, whatever made tokens of them: those trained on, and by task those evaluated on. None and empty in
    # runs of earlier versions.
    trained_on: str | None = None
    evaluated_on: dict[str, str] = {}
    options: dict[str, Any] | None = None  # that its checkpoints were made with, as in config.yaml
    changes: list[Change] = []  # of a run that was resumed, in order


class Forgetting(Record):
    """What a base forgets (`ptmoe.evaluate.forgetting`): the mean loss of the same `tokens` of so many `texts`, in
    nats, of the untouched base (`base_loss`) and with the adapter (`loss`)."""

    texts: int
    tokens: int
    base_loss: float
    loss: float


class Result(Record):
    """What was trained, and what that took.

    Attributes:
        adapter_bytes: of the adapter's tensors as they are saved.
        examples_evaluated: training examples whose input is evaluated as well.
        peak_memory: the most bytes that the training held, allocated on a GPU, else resident; None where it is unknown.
        forgetting: None where it was not measured.
    """

    name: str
    method: str
    trainable_parameters: int
    train_seconds: float
    steps: int
    examples: int = 0
    examples_cut: int = 0
    examples_left_out: int = 0
    examples_evaluated: int = 0
    adapter_bytes: int | None = None
    peak_memory: int | None = None
    forgetting: Forgetting | None = None


class LogLine(Record):
    """One log of a training; keys that `transformers` adds are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    step: int | None = None
    seconds: float | None = None  # since training began
    loss: float | None = None  # mean over the supervised tokens since the previous line, in nats
    learning_rate: float | None = None  # of the optimiser
    grad_norm: float | None = None  # before clipping
    expert_use: list[float] | None = None  # the share of the training inputs that was routed to each expert, `(N,)`
    routing_confidence: float | None = None  # mean of the router's largest probability
    hardness: float | None = None  # of the gate, 0 soft, 1 the gate as it is used after training


class RoutingSummary(Record):
    """How a task's inputs were routed; `N` is `num_experts`."""

    num_experts: int  # `N`
    use: dict[str, list[float]]  # by domain, the share of its inputs whose largest gate entry is each expert's, `(N,)`
    mean_gate: dict[str, list[float]]  # by domain, the mean of each expert's gate entry, `(N,)`
    entropy: float  # of the use over all inputs, in nats
    mutual_information: float  # of expert and domain, in nats
    prompt_similarity: list[list[float]] | None = None  # cosine of every pair of expert prompts, `(N, N)`
    soft_gate: bool | None = None  # whether the gate mixes all experts; None in folders that do not say
    one_expert: bool = False  # whether the router chooses the same one whatever it reads (`router_test`)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.num_experts < 1 or not self.use:
            raise ValueError("routing needs at least one expert and one domain")
        if (square := self.prompt_similarity or []) and len(square) != self.num_experts:
            raise ValueError(f"prompt_similarity has {len(square)} rows for num_experts={self.num_experts}")
        for row in (*self.use.values(), *self.mean_gate.values(), *square):
            if len(row) != self.num_experts:
                raise ValueError(f"a row of routing has {len(row)} values for num_experts={self.num_experts}")
        if self.use.keys() != self.mean_gate.keys():
            raise ValueError("use and mean_gate have different domains")
        return self

    @property
    def is_soft(self) -> bool:
        """Whether the gate mixes all experts, so that its largest entry decides nothing."""
        # In a folder that does not say, an entry of a hard gate is the router's probability, below 1, or exactly 1.
        mixed = (sum(gate) > 1 - 1e-6 and gate != self.use[domain] for domain, gate in self.mean_gate.items())
        return any(mixed) if self.soft_gate is None else self.soft_gate

    @property
    def shares(self) -> dict[str, list[float]]:
        """The share of each domain that each expert takes, `(N,)`: of its inputs, or of a soft gate."""
        if not self.is_soft:
            return self.use
        return {domain: [entry / (sum(gate) or 1.0) for entry in gate] for domain, gate in self.mean_gate.items()}

    def overall_shares(self, examples: Mapping[str, float]) -> list[float]:
        """`shares` over all inputs, `(N,)`, from the number of examples of each domain."""
        total = sum(examples[domain] for domain in self.shares) or 1
        return [
            sum(examples[domain] * share for domain, share in zip(self.shares, column, strict=True)) / total
            for column in zip(*self.shares.values(), strict=True)
        ]


class EvaluationSummary(Record, allow_inf_nan=False):  # NaN would spoil what a score is compared with
    """A task's scores in percent; `metric` is the one that ranks methods."""

    task: str
    file: str | None = None  # that the task is of, where its name is another
    split: str = "test"
    examples: int
    metric: str = "accuracy"
    metrics: dict[str, float]
    interval: dict[str, tuple[float, float]] = {}  # the 95 % interval of each metric, over examples
    by_domain: dict[str, dict[str, int | float]] = {}  # `examples` and the task's metrics
    mean_of_domains: dict[str, float] = {}  # the plain mean of their scores, the form of SVAMP's figure in the paper
    cut: int = 0  # examples whose context was cut to fit
    unanswered: int = 0  # examples that do not fit even without their context; they score 0
    no_label: int = 0  # answers that are no label of a classification; they score 0
    routing: RoutingSummary | None = None
    seconds: float | None = None  # of the evaluation, without what an interrupted one had done
    settings: dict[str, Any] = {}  # what decided the predictions

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.metric not in self.metrics:
            raise ValueError(f"metrics has no {self.metric}")
        for domain, part in self.by_domain.items():
            if lacking := {"examples", self.metric} - part.keys():
                raise ValueError(f"by_domain.{domain} has no {', '.join(sorted(lacking))}")
        return self

    @property
    def source(self) -> str:
        """What `load_task` finds its examples by."""
        return self.file or self.task

    @property
    def score(self) -> float:
        """Of the ranking metric, in percent, over all examples."""
        return self.metrics[self.metric]

    @property
    def overall_shares(self) -> list[float]:
        """The share of the task that each expert takes, `(N,)`; empty where nothing was routed."""
        if self.routing is None:
            return []
        counts = {domain: part["examples"] for domain, part in self.by_domain.items()}
        elsewhere = self.examples - sum(counts.values())
        return self.routing.overall_shares({domain: counts.get(domain, elsewhere) for domain in self.routing.use})

    @property
    def collapsed_expert(self) -> int | None:
        """The one of several experts that takes at least 95 % of the task, where the router chooses."""
        return None if self.routing is None or self.routing.one_expert else collapsed_expert(self.overall_shares)


def collapsed_expert(shares: Sequence[float]) -> int | None:
    """The one of several experts whose share is at least 95 %."""
    return shares.index(max(shares)) if len(shares) > 1 and max(shares) >= COLLAPSED_SHARE else None


class NearestWords(Record):
    """For each expert, for each of its virtual tokens, the nearest words of the base's vocabulary with their cosines,
    nearest first; no expert for a method without virtual tokens."""

    experts: list[list[list[tuple[str, float]]]]

    @model_validator(mode="after")
    def _equally_many(self) -> Self:
        if len({len(tokens) for tokens in self.experts}) > 1:
            raise ValueError("experts differ in their number of virtual tokens")
        return self


class CellRecord(Record):
    """A finished cell: one method at one size, trained on one task with one seed, and evaluated."""

    label: str
    method: str
    size: dict[str, Any] = {}
    task: str
    eval_tasks: list[str]
    seed: int
    trainable_parameters: int


class Failure(Record):
    """A cell that failed when it was last run."""

    label: str
    task: str
    seed: int | None = None
    error: str

    @property
    def cell(self) -> tuple[str, str, int | None]:
        return self.label, self.task, self.seed


@dataclass(frozen=True)
class Prediction:
    """One answered example.

    Not a `Record`: a text that a model writes may hold a lone surrogate, which pydantic refuses.

    Attributes:
        id: the example's.
        references: the example's.
        domain: the example's.
        prompt: as the model was given it; cut where it was.
        completion: the model's.
        scores: by metric, from 0 to 1.
        gate: over the experts; None for a method that does not route.
        cut: tokens of the context that were left out of the prompt.
        answered: false where the prompt does not fit the base even without its context; such an example scores 0.
    """

    id: str
    prompt: str
    completion: str
    references: list[str]
    scores: dict[str, float]
    domain: str = ""
    gate: list[float] | None = None
    cut: int = 0
    answered: bool = True

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """
        Raises:
            ValueError, TypeError: the line is no prediction.
        """
        written = json.loads(line)
        known = {field.name: written[field.name] for field in fields(cls) if field.name in written}
        return cls(**{**known, "scores": {metric: float(score) for metric, score in dict(known["scores"]).items()}})

    def line(self) -> bytes:
        """As a line of a file; a lone surrogate, which has no UTF-8, becomes its JSON escape."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")


def _problems(error: ValidationError) -> str:
    messages = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = f"{key}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        messages.append(f"{key} is missing" if problem["type"] == "missing" else message)
    return "; ".join(messages)
