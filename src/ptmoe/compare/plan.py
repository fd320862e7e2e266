"""What is compared: one typed plan from flags, a YAML file or a preset, and the cells it comes to.

    model: nano
    methods: [pt, {name: pt-moe, num_virtual_tokens: 10, num_experts: 4}]
    budget: 3840
    tasks: [nano/mixed]
    seeds: 3
    max_steps: 300

is six cells: two methods, their free sizes picked at the budget, one task, seeds 0, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import Self

from ptmoe.compare.budget import free_sizes, parse_budget
from ptmoe.compare.presets import PRESETS
from ptmoe.compare.presets import preset as preset_plan
from ptmoe.errors import PtmoeError
from ptmoe.files import write_whole
from ptmoe.runs.folders import PLAN_FILE
from ptmoe.settings import Settings, read_yaml
from ptmoe.train.options import Count

# How the command works, not what is compared: in no YAML that it writes.
UNTOLD = frozenset({"output_dir", "strict", "jobs"})
# What a later run in the same folder may add to.
EXTENSIBLE = frozenset({"preset", "title", "methods", "tasks", "seeds", "vary", "budget", "learning_rate"})


def _entries(value: Any) -> Any:
    """A method may be its name alone, and a list of one be that one."""
    values = value if isinstance(value, list | tuple) else [value]
    return [{"name": one} if isinstance(one, str) else one for one in values]


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


def _seeds(value: Any) -> Any:
    if value in (0, []):
        raise ValueError(f"seeds={value}: needs at least one")
    return list(range(value)) if isinstance(value, int) else value


def budgets(value: Any) -> list[int]:
    """One budget or several, as `parse_budget` reads them; none for None."""
    return [parse_budget(one) for one in _listed(value) or []]


Names = Annotated[list[str], BeforeValidator(_listed)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ComparePlan(Settings):
    """
    Attributes:
        model: `nano`, a folder, or a Hub repository; `revision` of the latter.
        dtype, quantization: of the frozen base, as in `ptmoe train`.
        preset: where the plan came from (`ptmoe.compare.presets`).
        title: of the report.
        methods: each a name, or `{"name": …}` with fields of the method's config and, if they differ from the plan's, a
            `learning_rate` and a `budget` (None: none). A `label` names it in the table and its folder. `base` is the
            untouched base, which is evaluated once.
        vary: fields of the methods' configs, or `learning_rate`, and the values that each method is tried at, every
            combination.
        budget: trainable parameters; each method's free size is picked to come closest without passing it. Several
            budgets are several sizes of each method. A free size that is given is left, and only checked.
        tasks: what is trained on: each a named task, a group, a mixture or a JSON-lines file.
        eval_tasks: what each adapter is evaluated on: names, groups, or one file; by default the training task's own
            test splits.
        seeds: a number of them, from 0, or a list.
        data_dir, eval_data_dir, skip_bad, max_length, max_examples, eval_examples, eval_batch_size, max_new_tokens,
            max_steps, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps: as in `ptmoe train`.
        learning_rate: of all methods, or of each by its name; by default each method's own.
        train: any other option of `ptmoe train`, the same for every cell.
        output_dir: the comparison's folder; by default one under `runs/` named by the preset, or a new one.
        strict: stop at a cell that cannot be run, instead of leaving it out.
        jobs: cells at once, each in a process with its share of the cores; by default 1, on nano as many as cores.
    """

    model: str = "nano"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["8bit", "4bit"] | None = None
    preset: str | None = None
    title: str | None = None
    methods: Annotated[list[dict[str, Any]], BeforeValidator(_entries), Field(min_length=1)] = [
        {"name": "pt"},
        {"name": "pt-moe"},
    ]
    vary: dict[str, Annotated[list[Any], BeforeValidator(_listed), Field(min_length=1)]] = {}
    budget: Annotated[list[int], BeforeValidator(budgets)] = []
    tasks: Annotated[Names, Field(min_length=1)]
    eval_tasks: Annotated[list[str] | None, BeforeValidator(_listed)] = None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_seeds)] = [0]
    data_dir: str | None = None
    eval_data_dir: str | None = None
    skip_bad: bool = False
    max_length: Count | None = None
    max_examples: Count | None = None
    eval_examples: Count | None = None
    eval_batch_size: Count = 200
    max_new_tokens: Count | None = None
    max_steps: int = -1
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    per_device_train_batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    learning_rate: Rate | dict[str, Rate] | None = None
    train: dict[str, Any] = {}
    output_dir: str | None = None
    strict: bool = False
    jobs: Count | None = None

    def write(self, path: Path) -> None:
        """All at once, so that a killed run leaves no half of it."""
        import yaml

        text = yaml.safe_dump(self.model_dump(exclude=set(UNTOLD)), sort_keys=False, allow_unicode=True)
        write_whole(path, text)

    def differences(self, other: Self) -> list[str]:
        """What a run that goes on with this plan may not change, each in words."""
        names = [name for name in type(self).model_fields if name not in EXTENSIBLE | UNTOLD]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} was {before!r}, is {now!r}" for name, before, now in pairs if before != now]


def read_plan(path: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> ComparePlan:
    """A plan from a YAML file, or a comparison's folder, which is gone on with; `changes` and the file take precedence
    over a preset's values, `changes` over the file's.

    Methods named in `changes` are the preset's or the file's entries of that name, where it has them. A `budget` in
    `changes` takes the place of these entries' own free sizes.

    Raises:
        PtmoeError: no such file, not YAML, an unknown preset, or an unknown or unfit value.
    """
    changes = dict(changes or {})
    folder = Path(path) if path is not None and Path(path).is_dir() else None
    file = folder / PLAN_FILE if folder else Path(path) if path is not None else None
    if file is not None and not file.is_file():
        raise PtmoeError(f"no plan {file}: give a YAML file, or the folder of a comparison")
    written = {} if file is None else read_yaml(file)
    if folder is not None:
        changes = {"output_dir": str(folder), **changes}
    name = changes.get("preset", written.get("preset"))
    given = preset_plan(name, changes.get("model", written.get("model"))) if name is not None else {}
    for stated in (written, changes):  # else a preset's steps would outdo the epochs that a person asked for
        if "num_train_epochs" in stated:
            stated.setdefault("max_steps", -1)
    given = {**given, **written}
    known = _entries(given.get("methods", []))
    if "budget" in changes:
        known = [_without_size(entry) for entry in known]
        given = {**given, **({"methods": known} if known else {})}
    if "methods" in changes:
        changes["methods"] = [
            entry
            for asked in _entries(changes["methods"])
            for entry in ([one for one in known if asked == {"name": one.get("name")}] or [asked])
        ]
    plan = {**given, **changes}
    if "tasks" not in plan:
        raise PtmoeError(f"nothing to compare on: give a --task, or a --preset ({', '.join(PRESETS)})")
    try:
        return ComparePlan(**plan)
    except PtmoeError as error:
        raise PtmoeError(f"{path}: {error}" if path is not None else str(error)) from None


def _without_size(entry: Any) -> Any:
    """A method's entry open to another budget; one that was kept out of budgets stays as it is."""
    from ptmoe.methods import METHODS

    if not isinstance(entry, dict) or entry.get("budget", 1) is None or entry.get("name") not in METHODS:
        return entry
    replaced = ("budget", *free_sizes(METHODS[entry["name"]])[:1])
    return {name: value for name, value in entry.items() if name not in replaced}
