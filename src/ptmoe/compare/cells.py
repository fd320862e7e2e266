"""The parts of a plan: its methods at every size, its tasks, and the cells that can be run."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ptmoe.compare.budget import fit_budget, sizes_of
from ptmoe.compare.plan import ComparePlan, budgets
from ptmoe.compare.presets import preset as preset_plan
from ptmoe.errors import PtmoeError, near
from ptmoe.methods.base import MethodConfig
from ptmoe.models.attach import count_parameters
from ptmoe.models.bases import max_positions
from ptmoe.runs.folders import cell_folder, file_name
from ptmoe.runs.records import CellRecord
from ptmoe.settings import Settings
from ptmoe.tasks import (
    TASKS,
    Problems,
    check_data_dir,
    check_labels,
    check_size,
    is_file,
    load_task,
    task_named,
    task_names,
)
from ptmoe.tasks.local import Keys
from ptmoe.train.examples import evaluation_data_dir
from ptmoe.train.options import BASE, DEFAULT_METHOD, Rate, TrainOptions, method_config

OWN_KEYS = ("name", "label", "learning_rate", "budget")  # of a method's entry, beside the fields of its config
TYPICAL_INPUT = 64  # tokens, to sort cells by their cost


class _OwnRate(Settings):
    """What a method's entry or `vary` says of its learning rate; the plan checks neither."""

    learning_rate: Rate | None


class UntouchedConfig(MethodConfig):
    """The base as it is, a row beside the methods. It trains nothing, so it is not in `ptmoe.methods.METHODS`."""

    method: ClassVar[str] = BASE


@dataclass(frozen=True)
class Variant:
    """One row of the comparison: a method with all its settings."""

    label: str
    config: MethodConfig
    learning_rate: float | None  # None for the untouched base
    budget: int | None  # trainable parameters that its size was picked for, if any
    trainable_parameters: int  # on the plan's base

    @property
    def is_base(self) -> bool:
        """Whether it is the untouched base, which is evaluated once for each task, whatever the seeds."""
        return self.config.method == BASE

    @property
    def identity(self) -> tuple[str, str, float | None]:
        """What makes two variants the same, whatever their labels."""
        return self.config.method, self.config.model_dump_json(), self.learning_rate

    def entry(self) -> dict[str, Any]:
        """Its entry in a plan, with nothing left to defaults."""
        budget = {} if self.budget is None else {"budget": self.budget}
        own = {"name": self.config.method, "label": self.label, "learning_rate": self.learning_rate, **budget}
        return {**own, **self.config.model_dump()}


@dataclass(frozen=True)
class Cell:
    """One training run and its evaluations."""

    variant: Variant
    task: str
    eval_tasks: tuple[str, ...]
    seed: int
    options: TrainOptions  # all but the run folder

    @property
    def name(self) -> str:
        return f"{self.variant.label} on {self.task}" + ("" if self.variant.is_base else f", seed {self.seed}")

    @property
    def key(self) -> tuple[str, str, int]:
        """What no other cell of the comparison has."""
        return self.variant.label, self.task, self.seed

    @property
    def place(self) -> Path:
        """Its folder within the comparison's."""
        return cell_folder(*self.key)

    def record(self, trainable_parameters: int) -> CellRecord:
        """The content of `cell.json`."""
        return CellRecord(
            label=self.variant.label,
            method=self.variant.config.method,
            size=sizes_of(self.variant.config),
            task=self.task,
            eval_tasks=list(self.eval_tasks),
            seed=self.seed,
            trainable_parameters=trainable_parameters,
        )


class LeftOut(NamedTuple):
    """Cells that cannot be run, of a method, of a task or of an evaluation, and the reason."""

    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


def variants(plan: ComparePlan, base_config: Any, known: Sequence[Variant] = ()) -> tuple[list[Variant], list[LeftOut]]:
    """The plan's methods at all their sizes, and those that its base, of this config of `transformers`, or the budget
    does not allow. Settings that are among the `known` variants of a folder that is resumed keep their label.

    Raises:
        PtmoeError: an unknown method or field, a value that does not fit it, or two variants with one label.
    """
    chosen: list[Variant] = []
    left_out: list[LeftOut] = []

    def choose(variant: Variant, long_label: str) -> None:
        same = next((other for other in chosen if other.identity == variant.identity), None)
        if same is None:
            chosen.append(_with_label(variant, long_label, chosen, known))
        elif variant.label not in (same.label, same.config.method):
            left_out.append(LeftOut(variant.label, f"the same settings as {same.label!r}"))

    names = [str(entry.get("name", DEFAULT_METHOD)) for entry in plan.methods]
    rates = plan.learning_rate if isinstance(plan.learning_rate, dict) else dict.fromkeys(names, plan.learning_rate)
    for name in rates:
        if name not in names:
            raise PtmoeError(f"learning_rate of {name!r}, which is not compared{near(name, names)}")
    for name, entry in zip(names, plan.methods, strict=True):
        fields = {key: value for key, value in entry.items() if key not in OWN_KEYS}
        called = name if entry.get("label") is None else str(entry["label"])
        if name == BASE:
            choose(Variant(called, UntouchedConfig(**fields), None, None, 0), BASE)
            continue
        config_class = type(method_config({"name": name, **fields}))
        limits: list[int | None] = [*(budgets(entry["budget"]) if "budget" in entry else plan.budget)] or [None]
        for values, budget in itertools.product(itertools.product(*plan.vary.values()), limits):
            varied = dict(zip(plan.vary, values, strict=True))
            parts = [f"{key}={value}" for key, value in varied.items()]
            parts += [f"budget={budget}"] if len(limits) > 1 else []
            label = " ".join([called, *parts])
            given = (varied.pop("learning_rate", None), entry.get("learning_rate"), rates.get(name))
            rate = _OwnRate(learning_rate=next((rate for rate in given if rate is not None), None)).learning_rate
            known_fields = config_class.model_fields | config_class.shorthands
            if unknown := next((field for field in varied if field not in known_fields), None):
                reason = f"{name} has no {unknown!r} to vary{near(unknown, config_class.model_fields)}"
                left_out.append(LeftOut(label, reason))
                continue
            config = method_config({"name": name, **fields, **varied})
            try:
                if budget is not None:
                    config = fit_budget(base_config, config_class, budget, {**fields, **varied})
                count = _count(base_config, config, plan.quantization)
            except PtmoeError as error:
                left_out.append(LeftOut(label, str(error)))
                continue
            variant = Variant(label, config, rate or config.learning_rate_on(base_config), budget, count)
            settings = {**sizes_of(config), **fields, "learning_rate": variant.learning_rate}
            choose(variant, " ".join([label, *(f"{key}={value}" for key, value in settings.items())]))
    return chosen, left_out


def _count(base_config: Any, config: MethodConfig, quantization: str | None) -> int:
    positions, virtual = max_positions(base_config), sizes_of(config).get("num_virtual_tokens", 0)
    if positions is not None and virtual >= positions:
        raise PtmoeError(f"{virtual} virtual tokens leave no room for an input: the base has {positions} positions")
    config.check_quantization(quantization)
    return count_parameters(base_config, config)


def _with_label(variant: Variant, long_label: str, others: Sequence[Variant], known: Sequence[Variant]) -> Variant:
    """With its label in the folder that is resumed, else with a label that no other variant has."""
    for earlier in known:
        if earlier.identity == variant.identity:
            return replace(variant, label=earlier.label)
    taken = {file_name(other.label) for other in (*others, *known)}
    for label in (variant.label, long_label):
        name = file_name(label)
        if not name.strip() or name.startswith(".") or not label.isprintable() or "\\" in label:
            raise PtmoeError(f"label {label!r} cannot name a folder: choose another word")
        if name not in taken:
            return replace(variant, label=label)
    raise PtmoeError(f"two methods are called {variant.label!r}: give each a label of its own")


def evaluated(plan: ComparePlan, task: str) -> tuple[str, ...]:
    """The tasks that an adapter trained on `task` is evaluated on.

    Raises:
        PtmoeError: an unknown task, one without a test split, a file together with others, fewer examples than a
            mixture has parts, or choices of a task without labels.
    """
    if not plan.eval_tasks and is_file(task):
        raise PtmoeError(f"{task} is a file to train on: name the tasks to evaluate on with --eval-task")
    names = list(dict.fromkeys(name for tasks in plan.eval_tasks or [task] for name in task_names(tasks)))
    for name in names:
        if is_file(name) and len(names) > 1:
            raise PtmoeError(f"{name} is a file and {len(names)} tasks are evaluated: evaluate on it alone")
        if not is_file(name) and "test" not in TASKS[name].splits:
            raise PtmoeError(f"task {name!r} has no test split to evaluate on")
        check_size(name, plan.eval_examples)
    if plan.score == "choices":
        check_labels(map(task_named, names))
    return tuple(names)


def trainable_tasks(plan: ComparePlan) -> tuple[list[str], list[LeftOut]]:
    """The plan's tasks that have training data, and the others.

    Raises:
        PtmoeError: an unknown task, two with one name, or fewer examples than a mixture has parts.
    """
    kept: list[str] = []
    left_out: list[LeftOut] = []
    for task in dict.fromkeys(plan.tasks):
        check_size(task, plan.max_examples)
        lacking = [name for name in task_names(task) if not is_file(name) and "train" not in TASKS[name].splits]
        if lacking:
            left_out.append(LeftOut(task, f"{', '.join(lacking)} has no train split: it can only be evaluated on"))
        else:
            kept.append(task)
    check_names(kept)
    return kept, left_out


def check_names(tasks: Sequence[str]) -> None:
    """
    Raises:
        PtmoeError: the cells of two tasks would share their folders.
    """
    for number, task in enumerate(tasks):
        if earlier := next((other for other in tasks[:number] if file_name(other) == file_name(task)), None):
            raise PtmoeError(
                f"two tasks are called {file_name(task)!r}, {earlier} and {task}: rename one of the files, or, where "
                "it is the same one, name it as before"
            )


def available(plan: ComparePlan, say: Callable[[str], None]) -> tuple[ComparePlan, list[LeftOut]]:
    """The plan with the evaluations whose data exists or can be downloaded, which happens here.

    Only a preset's own evaluations may be missing: an evaluation that the user has asked for may not.

    Raises:
        PtmoeError: missing or bad data of a training task, or of an evaluation, or one file for several tasks.
    """

    keys = Keys(plan.train.get("prompt_key"), plan.train.get("completion_key"), where_there=True)

    def check(name: str, split: str, data_dir: str | None) -> None:
        problems = Problems(skip=plan.skip_bad, at_once=True)
        enough = len(task_named(name).parts) or 1
        load_task(name, split, data_dir, max_examples=enough, problems=problems, keys=keys, say=say)

    trained = dict.fromkeys(name for task in plan.tasks for name in task_names(task))
    check_data_dir(trained, plan.data_dir)
    for name in trained:
        check(name, "train", plan.data_dir)
    folder = evaluation_data_dir(plan)
    of_preset = [] if plan.preset is None else preset_plan(plan.preset, plan.model).get("eval_tasks", [])
    optional = {name for tasks in of_preset for name in task_names(tasks)}
    missing: dict[str, str] = {}
    tested = dict.fromkeys(name for task in plan.tasks for name in evaluated(plan, task))
    check_data_dir(tested, folder)
    for name in tested:
        try:
            check(name, "test", folder)
        except PtmoeError as error:
            if name not in optional:
                raise
            missing[name] = str(error)
    if not missing:
        return plan, []
    kept = [name for tasks in plan.eval_tasks or plan.tasks for name in task_names(tasks) if name not in missing]
    if not kept:
        raise PtmoeError(f"no data to evaluate on: {'; '.join(missing.values())}")
    left_out = [LeftOut(f"evaluation on {name}", reason) for name, reason in missing.items()]
    return plan.replace(eval_tasks=kept), left_out


def cells_of(plan: ComparePlan, chosen: Sequence[Variant], base_config: Any) -> list[Cell]:
    """The untouched base on every task, then every variant with every seed: the whole table of the first seed before
    the second begins, and cheap cells first.

    Raises:
        PtmoeError: options that `ptmoe train` does not have, or values that do not fit them.
    """
    text = base_config.get_text_config()
    weights = 12 * text.num_hidden_layers * text.hidden_size**2 + text.vocab_size * text.hidden_size

    def cost(variant: Variant) -> float:
        """Roughly proportional to the time of a step: the tokens of a row, and the weights that have gradients."""
        tokens = TYPICAL_INPUT + sizes_of(variant.config).get("num_virtual_tokens", 0)
        return float(tokens * (1 + variant.trainable_parameters / weights))

    trained = sorted((variant for variant in chosen if not variant.is_base), key=cost)
    pairs = [(0, variant) for variant in chosen if variant.is_base]  # the same folder, whatever the seeds
    pairs += [(seed, variant) for seed in dict.fromkeys(plan.seeds) for variant in trained]
    return [
        Cell(variant, task, evaluated(plan, task), seed, _train_options(plan, variant, task, seed))
        for seed, variant in pairs
        for task in plan.tasks
    ]


def _train_options(plan: ComparePlan, variant: Variant, task: str, seed: int) -> TrainOptions:
    shared = {name: getattr(plan, name) for name in TrainOptions.model_fields.keys() & ComparePlan.model_fields.keys()}
    own = {*shared, "method", "task", "data", "eval_task", "seed"}
    trainer = plan.train.get("trainer", {})
    for name in plan.train:
        if name in own:
            raise PtmoeError(f"train: {name!r} is an option of the comparison itself: give it there")
    if plan.train.get("validation_examples") is not None:
        raise PtmoeError("train: with 'validation_examples' no cell is evaluated on what is compared: leave it out")
    if isinstance(trainer, dict) and variant.config.trains_base:  # a checkpoint would hold the base's weights thrice
        trainer = {"save_strategy": "no", **trainer}
    cell = {
        "method": {"name": variant.config.method, **variant.config.model_dump()},
        "task": task,
        "eval_task": ",".join(evaluated(plan, task)),
        "seed": seed,
        "learning_rate": variant.learning_rate,
        "output_dir": None,
        "trainer": trainer,
    }
    return TrainOptions(**{**shared, **plan.train, **cell})
