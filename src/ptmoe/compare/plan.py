"""A comparison as one typed plan, from the command line, a YAML file or a preset.

    model: nano
    methods: [pt, {name: pt-moe, num_virtual_tokens: 10, num_experts: 4}]
    budget: 3840
    tasks: [nano/mixed]
    seeds: 3
    max_steps: 300

is six cells: two methods, their free sizes picked to fit the budget, one task, seeds 0, 1 and 2.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from typing_extensions import Self

from ptmoe.compare.presets import PRESETS
from ptmoe.compare.presets import preset as preset_plan
from ptmoe.errors import PtmoeError
from ptmoe.settings import Flag, differences, read_yaml
from ptmoe.train.options import DEFAULT_METHOD, PLACES, Count, Rate, SharedOptions, method_entry, scalar

MOST_SEEDS = 10_000
# What a later run in the same folder may add to.
EXTENSIBLE = {"preset", "title", "methods", "tasks", "seeds", "vary", "budget", "learning_rate"}


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else [value]


def _entries(value: Any) -> Any:
    """A method may be given by its name, or as `pt-moe:rank=8`, and a list of one method by that method."""
    return [method_entry(method) for method in _listed(value) or []]


def _variations(value: Any) -> Any:
    """`rank=4,8,16`, or several such texts, as `{"rank": [4, 8, 16]}`."""
    if not isinstance(value, str | list | tuple):
        return value
    varied = {}
    for text in map(str, _listed(value)):
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ValueError(f"vary {text!r}: needs FIELD=VALUE,VALUE,…")
        if name.strip() in varied:
            raise ValueError(f"vary {name.strip()!r} is given twice: give all of its values at once, as rank=4,8")
        varied[name.strip()] = [scalar(item) for item in values.split(",")]
    return varied


def _seeds(value: Any) -> Any:
    """The number of seeds, or a list of them; `5` and `0,3,5` as text."""
    if isinstance(value, str):
        parts = value.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"seeds {value!r}: needs how many, as 5, or which, as 0,3,5")
        value = [int(part) for part in parts] if len(parts) > 1 else int(value)
    if value in (0, []):
        raise ValueError(f"seeds={value}: needs at least one")
    if isinstance(value, int) and value > MOST_SEEDS:
        raise ValueError(f"seeds={value}: needs at most {MOST_SEEDS:,}")
    return list(range(value)) if isinstance(value, int) else value


def _factors(value: Any) -> Any:
    """Numbers in order; as text `0.1,1,10`."""
    values = value.split(",") if isinstance(value, str) else value
    try:
        found = sorted({float(each) for each in values})
    except (TypeError, ValueError):
        raise ValueError(f"search_factors {value!r}: needs numbers, as 0.1,1,10") from None
    if len(found) < 2:
        raise ValueError(f"search_factors {value!r}: needs two at least, or there is nothing to choose from")
    for low, high in pairwise(found):
        if low > 0 and high < 1.01 * low:  # rates are rounded to three digits
            raise ValueError(f"search_factors {value!r}: {low!r} and {high!r} are too close to tell their rates apart")
    return found


def _learning_rates(value: Any) -> Any:
    """A list of texts: `0.01` for all methods, or `pt=0.01` for one."""
    if not isinstance(value, list | tuple):
        return value
    rates: dict[str, float] = {}
    for text in map(str, value):
        name, _, rate = text.rpartition("=")
        if name in rates:
            raise ValueError(f"learning_rate {text!r} after {rates[name]:g}: give one number, or several with --vary")
        try:
            rates[name] = float(rate)
        except ValueError:
            raise ValueError(f"learning_rate {text!r}: needs a number, or METHOD=NUMBER") from None
    if "" in rates and len(rates) > 1:
        texts = " ".join(map(str, value))
        raise ValueError(f"learning_rate {texts}: give one number for all methods, or one for each by name")
    return rates.get("", rates)


def parse_budget(text: str | int) -> int:
    """A number of parameters: `80k`, `1.5M`, `80_000`, `80,000` or `80000`; a comma parts thousands.

    Raises:
        PtmoeError: anything else, or less than 1.
    """
    found = re.fullmatch(r"((?:\d{1,3}(?:,\d{3})+|\d[\d_]*)(?:\.\d+)?)([kmb]?)", str(text).strip().lower())
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    number = float(re.sub("[_,]", "", found[1])) * units[found[2]] if found else 0.0
    if not 1 <= number < math.inf or number != round(number):
        raise PtmoeError(f"budget {text!r}: needs a whole number of parameters, such as 80k, 1.5M or 80000")
    return round(number)


def budgets(value: Any) -> list[int]:
    """One budget or several, as `parse_budget` reads them; an empty list for None."""
    return [parse_budget(budget) for budget in _listed(value) or []]


def _whole_gpus(value: float) -> float:
    if value > 1 and value != round(value):
        raise ValueError(f"{value:g} GPUs: needs a fraction of one, or whole ones")
    return value


Gpus = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_whole_gpus)]


class ComparePlan(SharedOptions):
    """A comparison. Each field is an option of `ptmoe compare`, except `train`, which only a YAML file can set.

    An entry of `methods` has the method's `name`, fields of its config, and where they differ from the plan's a
    `learning_rate` and a `budget` (None for none); a `label` names it in tables and folders.
    """

    unwritten: ClassVar[set[str]] = {
        "output_dir",
        "strict",
        "on",
        "jobs",
        "gpus_per_cell",
    }  # how the command works, not what is compared

    preset: str | None = None
    """quickstart, paper-qa, paper-math, ablate-length, -experts, -size, -routing, -init or -noise; with --model nano on
    nano's world"""
    title: str | None = None
    """of the report"""
    model: str = "nano"
    """nano, smollm2, a folder, a GGUF file, or a Hugging Face Hub repository; by default the preset's, else nano"""
    methods: Annotated[
        list[dict[str, Any]], BeforeValidator(_entries), Field(min_length=1), Flag(("--method",), repeatable=True)
    ] = [{"name": "pt"}, {"name": "pt-moe"}]
    """a method, or one with fields as in pt-moe:rank=8,num_experts=4; base is the untouched base; several times"""
    vary: Annotated[
        dict[str, Annotated[list[Any], BeforeValidator(_listed), Field(min_length=1)]],
        BeforeValidator(_variations),
        Flag(repeatable=True),
    ] = {}
    """a field of the methods, or learning_rate, and the values to try: rank=4,8,16; several times for every
    combination"""
    budget: Annotated[list[int], BeforeValidator(budgets), Flag(repeatable=True)] = []
    """pick each method's free size to come closest to this many trainable parameters without exceeding it: 80k, 1.5M;
    several times for several sizes of each method"""
    tasks: Annotated[list[str], BeforeValidator(_listed), Field(min_length=1), Flag(("--task",))]
    """to train on: a task, a group, a mixture (a,b is one) or a JSON-lines file; several times"""
    eval_tasks: Annotated[list[str] | None, BeforeValidator(_listed), Flag(("--eval-task",))] = None
    """to evaluate on: tasks, groups, or one file; by default the training task's own test split; several times"""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], BeforeValidator(_seeds), Flag(repeatable=False)] = [0]
    """how many, counted from 0; or which: 0,3,5"""
    learning_rate: Annotated[Rate | dict[str, Rate] | None, BeforeValidator(_learning_rates), Flag(repeatable=True)] = (
        None
    )
    """of all methods, or of one: pt=0.01; by default each method's own; several times"""
    search: bool = False
    """try several learning rates for each method, size and task first, on validation examples, and use the best"""
    search_factors: Annotated[list[Rate], BeforeValidator(_factors), Flag(repeatable=False)] = [1 / 9, 1 / 3, 1, 3, 9]
    """which: the rate as it is given, or the method's own, times each of these numbers: 0.1,1,10"""
    search_seeds: Count = 3
    """trials at each rate"""
    search_steps: Count | None = None
    """of a trial; by default a third of a cell's"""
    search_examples: Count = 200
    """of the task's validation split, that trials are scored on; where it has none, the first of the training split,
    which trials do not train on"""
    train: dict[str, Any] = {}
    """other options of `ptmoe train`, the same for every cell"""
    output_dir: str | None = None
    """folder of the comparison; by default runs/PRESET-MODEL, or a new one under runs/"""
    strict: bool = False
    """stop at what cannot be run, instead of leaving it out"""
    jobs: Count | None = None
    """cells at once, each in a process with its share of the cores; by default 1, on nano as many as there are cores
    but at most 8; on a cluster, or with GPUs on Ray, as many as there is room for"""
    on: str = "processes"
    """where cells run: processes; ray, which starts Ray on this machine; ray://auto, the Ray cluster that this machine
    belongs to; ray://HOST:PORT, one by its client server"""
    gpus_per_cell: Gpus | None = None
    """on Ray; 0.25 lets four cells share a GPU; by default 1 where there are any"""

    @model_validator(mode="after")
    def _gpus_of_ray(self) -> Self:
        if self.gpus_per_cell is not None and self.on == "processes":
            raise ValueError(f"gpus_per_cell={self.gpus_per_cell:g} is for --on ray: processes share the GPU")
        return self

    @model_validator(mode="after")
    def _search_asked_for(self) -> Self:
        fields = [name for name in type(self).model_fields if name.startswith("search_")]
        for name in fields if not self.search else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} is for --search, which is not asked for")
        if self.search and "learning_rate" in self.vary:
            raise ValueError("search chooses the learning rate, and vary tries several: leave one of the two out")
        return self

    def differences(self, other: Self) -> list[str]:
        """What a run that continues this plan may not change, each as a sentence. Data may lie elsewhere: what they
        hold is compared with what finished cells were trained on (`ComparisonFolder`)."""
        names = [name for name in type(self).model_fields if name not in EXTENSIBLE | PLACES | self.unwritten]
        if None in (self.forgetting, other.forgetting):  # then one has no texts, or nano's own
            names.append("forgetting")
        return differences((name, getattr(self, name), getattr(other, name)) for name in names)


def read_plan(path: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> ComparePlan:
    """A plan from a YAML file, or of a comparison's folder, which is then continued.

    `changes` take precedence over the file, and both over the preset. A method in `changes` that is only named stands
    for the preset's or the file's entries of that name, where there are any. A `budget` in `changes` replaces the free
    sizes of these entries, and learning rates by name leave those of other methods as they are.

    Raises:
        PtmoeError: no such file, not YAML, an unknown preset, or an unknown key or unfit value.
    """
    from ptmoe.runs.folders import PLAN_FILE  # numpy comes with it, which the command's help does without

    changes, written = dict(changes or {}), {}
    if path is not None:
        file = Path(path)
        if file.is_dir():
            changes = {"output_dir": str(file), **changes}
            file = file / PLAN_FILE
        if not file.is_file():
            raise PtmoeError(f"no plan {file}: give a YAML file, or the folder of a comparison")
        written = read_yaml(file)
    preset = {**written, **changes}.get("preset")
    given = {} if preset is None else preset_plan(preset, {**written, **changes}.get("model"))
    for stated in (written, changes):  # otherwise a preset's max_steps would override the epochs that were asked for
        if "num_train_epochs" in stated:
            stated.setdefault("max_steps", -1)
    given = {**given, **written}
    plan = {**given, **changes}
    if "tasks" not in plan:
        raise PtmoeError(f"nothing to compare on: give a --task, or a --preset ({', '.join(PRESETS)})")
    entries = _entries(given.get("methods"))
    if "budget" in changes:
        entries = [_without_size(entry) for entry in entries]
    rates = before = None
    with suppress(ValueError):  # which the plan then says
        rates, before = (_learning_rates(stated.get("learning_rate")) for stated in (changes, given))
    if rates is not None:
        entries = [_without_rate(entry, rates) for entry in entries]
    if "methods" in changes:
        entries = [entry for asked in _entries(changes["methods"]) for entry in _matching(asked, entries) or [asked]]
    if entries:
        plan["methods"] = entries
    if isinstance(rates, dict) and before is not None:  # the other methods keep theirs
        compared = entries or ComparePlan.model_fields["methods"].default
        names = [entry.get("name", DEFAULT_METHOD) for entry in compared if isinstance(entry, dict)]
        kept = before if isinstance(before, dict) else dict.fromkeys(names, before)
        plan["learning_rate"] = {name: kept[name] for name in names if name in kept} | rates
    try:
        return ComparePlan(**plan)
    except PtmoeError as error:
        raise PtmoeError(f"{path}: {error}" if path is not None else str(error)) from None


def _matching(asked: Any, entries: list[Any]) -> list[Any]:
    """The entries of a method that is only named."""
    return [entry for entry in entries if isinstance(entry, dict) and asked == {"name": entry.get("name")}]


def _without_rate(entry: Any, rates: Any) -> Any:
    """A method's entry without a learning rate of its own, where one is asked for all methods or for this one."""
    if not isinstance(entry, dict) or (isinstance(rates, dict) and entry.get("name") not in rates):
        return entry
    return _without(entry, "learning_rate")


def _without_size(entry: Any) -> Any:
    """A method's entry, its size open to another budget; an entry that was kept out of budgets stays as it is."""
    from ptmoe.methods import method_named

    if not isinstance(entry, dict) or entry.get("budget", 1) is None:
        return entry
    try:
        replaced = ("budget", *method_named(entry.get("name")).free_sizes[:1])
    except PtmoeError:  # the base, or no method, which is said later
        return entry
    return _without(entry, *replaced)


def _without(entry: dict[str, Any], *replaced: str) -> dict[str, Any]:
    """A method's entry without some of its keys; a label that was made of them no longer says their values."""
    kept = {name: value for name, value in entry.items() if name not in replaced}
    if isinstance(label := kept.get("label"), str):
        kept["label"] = re.sub(rf" ({'|'.join(replaced)})=\S+", "", label)
    return kept
