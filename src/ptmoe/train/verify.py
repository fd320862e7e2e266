"""Whether a run still comes out as its folder records it: what it was made of is compared, its evaluations repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ptmoe.errors import PtmoeError
from ptmoe.runs.environment import environment
from ptmoe.runs.folders import CONFIG_FILE, Run, distinct_tasks, read_run
from ptmoe.runs.predictions import read_predictions
from ptmoe.runs.records import EvaluationSummary
from ptmoe.tasks import Problems, is_file, load_task, task_named, task_names
from ptmoe.train.examples import evaluation_data_dir, evaluation_examples, evaluation_split, training_examples
from ptmoe.train.options import BASE, TrainOptions, method_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptmoe.models.causal import PromptedCausalLM
    from ptmoe.tasks.base import Example, Task

    HeldOut: TypeAlias = dict[tuple[str, str], tuple[Task, list[Example]]]  # by the task's name and the split


@dataclass(frozen=True)
class Check:
    """Something that a run folder records, and what it is now."""

    what: str
    recorded: Any  # in the folder
    found: Any  # now; where there is none, the reason
    # Whether the run counts as changed where the two differ. Versions may explain a difference, and make none by
    # themselves.
    decides: bool = True

    @property
    def equal(self) -> bool:
        return bool(self.recorded == self.found)


def verify(
    folder: str | Path,
    *,
    data_dir: str | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> list[Check]:
    """Load a finished run's base and adapter, repeat its evaluations, and compare; nothing is written.

    Args:
        folder: of the run.
        data_dir: where the evaluated data sets are, by default where the run's options say; and where its training data
            and its own files are, under their names, if they are there no more.
        device: as in `ptmoe.models.attach.load_run`.
        say: gets a line of text for each download.

    Raises:
        PtmoeError: no finished run, or damaged records.
    """
    run = read_run(folder)
    options = TrainOptions.read(run.folder / CONFIG_FILE)
    now = {name: _moved(value, data_dir) for name in ("data", "task") if (value := getattr(options, name)) is not None}
    if data_dir is not None and not Path(options.eval_data_dir or ".").exists():
        now["eval_data_dir"] = data_dir
    return list(_checks(run, options.replace(**now), data_dir, device, say))


def _moved(name: str, data_dir: str | None) -> str:
    """A task's name; of a file or folder that is not there any more, where one of its name is now."""
    if data_dir is None or Path(name).exists():
        return name
    with suppress(PtmoeError):
        if not is_file(name) and task_names(name):
            return name
    places = (place for place in (Path(data_dir), Path(data_dir, Path(name).name)) if place.name == Path(name).name)
    return next((str(place) for place in places if place.exists()), name)


def _checks(
    run: Run, options: TrainOptions, data_dir: str | None, device: str | None, say: Callable[[str], None]
) -> Iterator[Check]:
    from ptmoe.models.attach import load_run
    from ptmoe.models.bases import load_base
    from ptmoe.models.causal import PromptedCausalLM

    here = environment(options.seed)
    for name, version in run.environment.versions.items():
        yield Check(f"version of {name}", version, here.versions.get(name), decides=False)
    yield Check("commit of ptmoe", run.environment.commit, here.commit, decides=False)
    base: dict[str, Any] = {"revision": options.revision, "dtype": options.dtype, "quantization": options.quantization}
    try:
        if options.method["name"] == BASE:
            loaded, tokenizer = load_base(options.model, device=device, **base)
            model = PromptedCausalLM(loaded.eval())
        else:
            with_adapter = load_run(run.folder, model=options.model, device=device, **base)
            model, tokenizer = with_adapter.model, with_adapter.tokenizer
    except PtmoeError as error:
        yield Check("base and adapter", "as they were", str(error))
        return
    if run.environment.data is not None:
        try:
            data = _training_data(options, data_dir, model, tokenizer, say)
        except PtmoeError as error:
            data = str(error)
        yield Check("training data", run.environment.data, data)
    held_out = _held_out(options, data_dir, say)
    for name, summary in run.evaluations.items():
        try:
            found = list(_evaluation(run, options, name, summary, model, tokenizer, data_dir, held_out, say))
        except PtmoeError as error:
            found = [Check(f"{name}: evaluation", "as it was", str(error))]
        yield from found


def _training_data(
    options: TrainOptions,
    data_dir: str | None,
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> str:
    from ptmoe.tasks.tokens import row_length
    from ptmoe.train.data import fit

    problems = Problems(skip=options.skip_bad, at_once=options.data is None)
    try:
        examples = training_examples(options, problems, say)
    except PtmoeError:  # moved, perhaps
        if data_dir is None or options.data is not None:
            raise
        examples = training_examples(options.replace(data_dir=data_dir), problems, say)
    length = row_length(model.max_positions, method_config(options.method).num_virtual_tokens, options.max_length)
    shown: dict[str, Any] = {"cache": options.token_cache, "problems": problems, "say": say}
    return fit(examples, tokenizer, length, options.truncation, chat=bool(options.chat), **shown).fingerprint()


def _held_out(options: TrainOptions, data_dir: str | None, say: Callable[[str], None]) -> HeldOut:
    """What the run evaluated by itself after its training, by the name and the split of each task; nothing where the
    data is not there, which reading a task's examples then says."""
    if data_dir is not None and options.data is None:
        options = options.replace(**{"eval_data_dir" if options.validation_examples is None else "data_dir": data_dir})
    with suppress(PtmoeError):
        found, split = evaluation_examples(options.replace(skip_bad=True), say), evaluation_split(options)
        return {(task.name, split): (task, found[name]) for name, task in distinct_tasks(found).items()}
    return {}


def _evaluation(
    run: Run,
    options: TrainOptions,
    name: str,
    summary: EvaluationSummary,
    model: PromptedCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data_dir: str | None,
    held_out: HeldOut,
    say: Callable[[str], None],
) -> Iterator[Check]:
    from ptmoe.evaluate import evaluate

    recorded, settings = read_predictions(run.predictions[name]), summary.settings
    if not settings:
        raise PtmoeError(f"{run.folder} does not record what decided these predictions: evaluate again")
    task, own = held_out.get((summary.task, summary.split), (None, []))
    task = task or replace(task_named(_moved(summary.source, data_dir)), name=summary.task)
    again = evaluate(
        model,
        tokenizer,
        _asked(summary, {each.id for each in recorded}, own, data_dir or evaluation_data_dir(options), options, say),
        task=task,
        split=summary.split,
        score=settings.get("score", "answers"),
        batch_size=options.eval_batch_size,
        max_new_tokens=settings.get("max_new_tokens"),
        max_length=settings.get("max_length"),
        chat=bool(settings.get("chat")),
    )
    for key, value in settings.items():
        yield Check(f"{name}: {key}", value, again.settings.get(key), decides=key != "version")
    found = {each.id: each for each in again.predictions}
    for what in ("completion", "references", "cut", "answered", "scores"):
        same = sum(getattr(each, what) == getattr(found.get(each.id), what, None) for each in recorded)
        yield Check(f"{name}: predictions of equal {what}", len(recorded), same)
    scores = again.summary().metrics
    for metric, value in summary.metrics.items():
        yield Check(f"{name}: {metric}", value, scores.get(metric))


def _asked(
    summary: EvaluationSummary,
    ids: set[str],
    own: list[Example],
    data_dir: str | None,
    options: TrainOptions,
    say: Callable[[str], None],
) -> list[Example]:
    """The examples that were evaluated: the run's `own`, or usually the first ones, or of all those with the recorded
    ids."""
    found = [example for example in own if example.id in ids]
    if len(found) == len(ids):
        return found
    for limit in (summary.examples, None):
        problems = Problems(skip=True)  # as `ptmoe eval` may have done; whether any is missing, its id tells
        how: dict[str, Any] = {"max_examples": limit, "problems": problems, "keys": options.keys, "say": say}
        found = load_task(_moved(summary.source, data_dir), summary.split, data_dir, **how)
        found = [example for example in found if example.id in ids]
        if len(found) == len(ids):
            break
    if len(found) < len(ids):
        bad = f"; {problems.listed()}" if problems.count else ""
        raise PtmoeError(f"{len(ids) - len(found):,} of its {len(ids):,} examples are not in the data any more{bad}")
    return found
