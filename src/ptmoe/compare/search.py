"""A search as one typed plan, and the settings of each of its trials."""

import math
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BeforeValidator, Field

from ptmoe.compare.plan import Gpus
from ptmoe.compare.ray_session import LOCAL, NEAREST, check_place
from ptmoe.errors import PtmoeError, near
from ptmoe.settings import Flag
from ptmoe.train.arguments import check_arguments
from ptmoe.train.options import PLACES, Count, TrainOptions, method_config, scalar

RANGE = re.compile(r"([\d.eE+-]+?)\.\.([\d.eE+-]+)")


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return None


def _search(value: Any) -> Any:
    """`rank=4,8`, or several such texts, as a mapping; of each field a list of values, or a range as text."""
    if isinstance(value, str | list | tuple):
        texts = [value] if isinstance(value, str) else value
        pairs = [str(text).partition("=") for text in texts]
        if wrong := next((text for text, pair in zip(texts, pairs, strict=True) if not pair[2]), None):
            raise ValueError(f"search {wrong!r}: needs FIELD=LOW..HIGH or FIELD=VALUE,VALUE,…")
        value = {field.strip(): text for field, _, text in pairs}
        if len(value) < len(pairs):
            raise ValueError("search: a field is given twice: give all of its values at once, as rank=4,8")
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for field, text in value.items():
        if isinstance(text, str) and (ends := RANGE.fullmatch(text.strip())):
            low, high = map(_number, ends.groups())
            if low is None or high is None or not low < high:
                raise ValueError(f"search {field}={text}: needs two numbers, the lower one first")
            found[str(field)] = text.strip()
        else:
            found[str(field)] = [scalar(part) for part in text.split(",")] if isinstance(text, str) else text
    return found


class TunePlan(TrainOptions):
    """A search. Each field is an option of `ptmoe tune`, which are those of `ptmoe train` and its own."""

    unwritten: ClassVar[set[str]] = {"output_dir", "jobs", "on", "gpus_per_trial"}

    output_dir: str | None = None
    """folder of the search; by default a new one under runs/"""
    search: Annotated[
        dict[str, str | Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_search), Flag(repeatable=True)
    ] = {}
    """a field of the method, or of the training, and where to look: rank=4,8,16 or learning_rate=0.001..0.1; several
    times; by default the learning rate, and the router's noise and the rank of methods that have them"""
    trials: Count = 20
    """how many; the first has the settings as they are given, the others are drawn at random"""
    evaluations: Count = 9
    """validations of a trial, evenly over its steps; after the 1st, 3rd, 9th, … only the best third continues"""
    validation_examples: Count = 200
    """trials are scored on so many: of the task's validation split, or, where it has none, the first of the training
    split, which no trial trains on"""
    on: str = LOCAL
    """where trials run: ray, which starts Ray on this machine; or ray://auto, the Ray cluster that this machine belongs
    to, whose machines share the output folder"""
    jobs: Count | None = None
    """trials at once; by default as many as there is room for, on this machine without a GPU 1"""
    gpus_per_trial: Gpus | None = None
    """0.25 lets four trials share a GPU; by default 1 where there are any"""

    def trial(self, settings: dict[str, Any], **changes: Any) -> TrainOptions:
        """The training with some of its settings replaced; those that are none of its own are the method's."""
        own = {name: getattr(self, name) for name in TrainOptions.model_fields}
        for name, value in settings.items():
            if name in TrainOptions.model_fields:
                own[name] = value
            else:
                own["method"] = {**own["method"], name: value}
        return TrainOptions(**{**own, **changes})


def read_plan(path: Path | None, changes: dict[str, Any]) -> TunePlan:
    """From a YAML file, or of a folder, whose search is then continued; `changes` take precedence.

    Raises:
        PtmoeError: no such file, or an unknown key or unfit value.
    """
    from ptmoe.runs.folders import TUNE_FILE  # numpy comes with it, which the command's help does without

    if path is None:
        return TunePlan(**changes)
    if path.is_dir():
        return TunePlan.read(path / TUNE_FILE, **{"output_dir": str(path), **changes})
    return TunePlan.read(path, **changes)


def resolved(plan: TunePlan) -> TunePlan:
    """With the learning rate, and with the fields to search.

    Raises:
        PtmoeError: Ray is not installed, a field that neither the method nor the training has, or a value that cannot
            be used.
    """
    if plan.on not in (LOCAL, NEAREST):
        raise PtmoeError(f"on {plan.on!r}: a search runs on ray, or with ray://auto on a machine of the cluster")
    check_place(plan.on)
    config = method_config(plan.method)
    if plan.learning_rate is None:
        from ptmoe.models.bases import load_config

        base_config = load_config(plan.model, revision=plan.revision)
        plan = plan.replace(learning_rate=config.learning_rate_on(base_config))
    search = plan.search or _usual(config, float(plan.learning_rate or 0))
    known = {**type(config).model_fields, **TrainOptions.model_fields}
    kept = {"method", "task", "data", "model", "output_dir", "max_steps", "num_train_epochs", "max_examples", "trainer"}
    kept |= {"validation_examples", "revision", "dtype", "quantization", *PLACES}
    for field in search:
        if field not in known or field in kept:
            raise PtmoeError(f"search: {config.method} has no {field!r} to vary{near(field, known.keys() - kept)}")
    plan = plan.replace(search=search)
    seen: set[str] = set()
    for settings in drawn(plan):  # a value that does not fit is reported before a trial starts
        options = plan.trial(settings)
        config = method_config(options.method)
        if (rest := options.model_dump_json(exclude={"method", "learning_rate"})) not in seen:
            check_arguments(options, config, here=plan.on == LOCAL)
            seen.add(rest)
    return plan


def _usual(config: Any, rate: float) -> dict[str, Any]:
    search: dict[str, Any] = {"learning_rate": f"{rate / 10:g}..{rate * 10:g}"}
    fields = type(config).model_fields
    if "router_noise" in fields:
        search["router_noise"] = [0.0, 0.05, 0.1, 0.2]
    if "rank" in fields:
        search["rank"] = sorted({max(1, config.rank // part) for part in (1, 2, 4)} | {config.rank})
        if search["rank"] == [1]:
            search["rank"] = [1, 2, 4]
    return search


def drawn(plan: TunePlan) -> list[dict[str, Any]]:
    """The settings of each trial, the same for the same plan; the first replaces none."""
    chance, found = random.Random(plan.seed), list[dict[str, Any]]([{}])
    fields = {**type(method_config(plan.method)).model_fields, **TrainOptions.model_fields}
    fractions = {field for field in plan.search if _is_float(fields[field].annotation)}
    for _ in range(1, plan.trials):
        found.append({field: _draw(chance, values, field in fractions) for field, values in plan.search.items()})
    return found


def _is_float(annotation: Any) -> bool:
    return annotation is float or any(map(_is_float, get_args(annotation)))


def _draw(chance: random.Random, values: str | list[Any], fractions: bool) -> Any:
    """One of the values, or a number of the range: by its logarithm where the range goes over more than a decade; a
    whole one where its ends are and the field has no `fractions`."""
    if isinstance(values, list):
        return chance.choice(values)
    ends = RANGE.fullmatch(values)
    assert ends is not None
    low, high = map(_number, ends.groups())
    assert low is not None
    assert high is not None
    if low > 0 and high >= 10 * low:
        value = math.exp(chance.uniform(math.log(low), math.log(high)))
    else:
        value = chance.uniform(low, high)
    whole = not fractions and isinstance(low, int) and isinstance(high, int)
    return min(high, max(low, round(value))) if whole else float(f"{value:.3g}")
