"""Whether a run may be resumed: with the base, the method, the data and the options that its folder records.

Whatever was not given is taken from the record. What the checkpoints were made with stands in `environment.json`, so
that a `config.yaml` which was changed since is noticed. All checks come before anything is written. With `--force` what
differs is taken as it is given, and both values are recorded with the step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.models.bases import commit_of
from ptmoe.runs.environment import environment, moved, world_size
from ptmoe.runs.folders import ADAPTER_FOLDER, CHECKPOINTS_FOLDER, CONFIG_FILE, ENVIRONMENT_FILE, RESULT_FILE
from ptmoe.runs.records import Change, Environment
from ptmoe.settings import differences
from ptmoe.train.checkpoints import RANDOM_STATE
from ptmoe.train.options import PLACES, TrainOptions, method_config

if TYPE_CHECKING:
    from ptmoe.models.causal import PromptedCausalLM

# Options that decide nothing about the training. Where the data lie may change: what they hold may not (`check_data`).
FREE = {
    *PLACES,
    *("output_dir", "skip_bad", "token_cache", "logging_steps", "report_to", "save_steps", "save_total_limit"),
    *("eval_task", "eval_examples", "eval_batch_size", "max_new_tokens", "score", "fsdp"),
}
FORCE = "go on as you say with --force, which records both"
Differences = dict[str, tuple[Any, Any]]  # by name, the recorded and the given value
# None stands for what the run chose, which its record has.
RESOLVED = {"chat", "learning_rate", "revision"}
RESOLVED_FIELDS = {"target_modules", "feedforward_modules"}  # of the method


def is_run(folder: Path) -> bool:
    """Whether there is a run to go on with.

    Raises:
        PtmoeError: there is what a run has made, and not what it was made with.
    """
    if (folder / CONFIG_FILE).exists():
        return True
    held = [name for name in (RESULT_FILE, ADAPTER_FOLDER) if (folder / name).exists()]
    held += [CHECKPOINTS_FOLDER] if has_checkpoints(folder) else []
    if held:
        raise PtmoeError(
            f"{folder} holds {', '.join(held)}, and {CONFIG_FILE}, which says how they were made, is missing: put it "
            "back, or choose another --output-dir"
        )
    return False


def has_checkpoints(folder: Path) -> bool:
    return any((folder / CHECKPOINTS_FOLDER).glob("checkpoint-*"))


def recorded(folder: Path, **changes: Any) -> TrainOptions:
    """The options of a run that was interrupted; `changes` take precedence.

    Raises:
        PtmoeError: there is none, or the changes do not fit.
    """
    if not (folder / CONFIG_FILE).exists():
        raise PtmoeError(f"{folder} holds no run to resume ({CONFIG_FILE} is missing)")
    return TrainOptions.read(folder / CONFIG_FILE, **changes)


def continued(options: TrainOptions, folder: Path, force: bool = False) -> tuple[TrainOptions, Differences]:
    """The options that a run's checkpoints were made with, with those of `options` and of its `config.yaml` that may
    change, or by force with all; and what differs.

    Raises:
        PtmoeError: an option that was given, or that `config.yaml` has, differs; all that do are named. The method
            itself cannot be changed even by force.
    """
    config = recorded(folder)
    known = folder / ENVIRONMENT_FILE
    made = Environment.read(known).options if known.exists() and has_checkpoints(folder) else None
    record = config if made is None else TrainOptions(**made)
    given = options.model_dump(include=options.model_fields_set)
    if given.get("revision") is not None:  # the record has the commit
        given["revision"] = commit_of(options.model, given["revision"])
    written, written_fields = _differing(config.model_dump(), record)
    asked, asked_fields = _differing(given, record)
    set_fields = method_config(options.method).model_fields_set if "method" in given else set()
    # What is given takes precedence over what stands in the file.
    chosen = {name: values for name, values in written.items() if name not in given} | asked
    fields = {name: values for name, values in written_fields.items() if name not in set_fields} | asked_fields
    differing = chosen | fields
    if differing and (not force or "method" in chosen):
        places = [name for name in ("data", "data_dir") if name in given and given[name] != getattr(record, name)]
        named = differing | {name: (getattr(record, name), given[name]) for name in places}
        changes = ", ".join(differences((name, *values) for name, values in named.items()))
        otherwise = "" if "method" in chosen else f", {FORCE}"
        edited = [name for name, values in (written | written_fields).items() if differing.get(name) == values]
        raise PtmoeError(
            f"{folder} was trained otherwise ({changes}): "
            + (
                f"its {CONFIG_FILE} was changed since, put {', '.join(edited)} back as before"
                if edited
                else f"continue it as it was, with `ptmoe train --resume --output-dir {folder}`"
            )
            + f"{otherwise}, or choose another --output-dir"
        )
    free = {name: given.get(name, value) for name, value in config.model_dump(include=FREE).items()}
    changed = {name: value for name, (_, value) in chosen.items()}
    method = {**record.method, **{name: value for name, (_, value) in fields.items()}}
    return record.replace(**free, **changed, method=method), differing


def _differing(given: dict[str, Any], record: TrainOptions) -> tuple[Differences, Differences]:
    """The options that are not as recorded, and the fields of the method."""
    was = record.model_dump()
    options = {
        name: (was[name], value)
        for name, value in given.items()
        if name not in FREE | {"method"} and value != was[name] and not (name in RESOLVED and value is None)
    }
    if "method" not in given:
        return options, {}
    method, before = method_config(given["method"]), method_config(record.method).model_dump()
    if given["method"]["name"] != record.method["name"]:
        return options | {"method": (record.method["name"], given["method"]["name"])}, {}
    asked = method.model_dump(include=method.model_fields_set)
    return options, {
        name: (before[name], value)
        for name, value in asked.items()
        if value != before[name] and not (name in RESOLVED_FIELDS and value is None)
    }


def record_start(
    folder: Path,
    options: TrainOptions,
    fast_paths: dict[str, str | None],
    change: Change | None = None,
    of: dict[str, Any] | None = None,
    *,
    failure: str | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write what is known before the run.

    Args:
        options: resolved.
        fast_paths: as `PromptedCausalLM.fast_paths` says.
        change: the step from which the run continues, 0 for the first, and what was changed there by force.
        of: the fingerprints of its base (`BaseIdentity.mark`) and of its data, by their names in `Environment`.
        failure: why layers that were to be compiled are not.
        say: gets a line if the run is resumed on another machine or with other versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiled = {"compiled_layers": failure or fast_paths["compiled_layers"]}
    here, known = environment(options.seed, fast_paths | compiled), folder / ENVIRONMENT_FILE
    before = Environment.read(known) if known.exists() else None
    changes = before.changes if before else []
    if change is not None:
        elsewhere = moved(before, here) if before and change.step else {}  # of step 0: all of it runs here
        if elsewhere:
            listed = ", ".join(f"{name} was {was}, is {now}" for name, (was, now) in elsewhere.items())
            say(f"resumed elsewhere ({listed}): the next steps may not come out as they would have")
        if differing := change.differences | elsewhere:
            changes = [*changes, Change(step=change.step, differences=differing)]
    options.write(folder / CONFIG_FILE)
    written = options.model_dump(exclude=options.unwritten)
    here.model_copy(update={**(of or {}), "options": written, "changes": changes}).write(known)


def changed_since(folder: Path, step: int) -> bool:
    """Whether a run has gone on otherwise from this step's checkpoint, or a later one's: stopped before it has saved
    another, it resumes from one that was made with other options than are recorded."""
    known = folder / ENVIRONMENT_FILE
    return known.exists() and any(change.step >= step for change in Environment.read(known).changes)


def check_data(
    folder: Path, data: str, options: TrainOptions, force: bool = False, say: Callable[[str], None] = print
) -> Differences:
    """
    Args:
        data: the fingerprint of the run's data as they are now.
        force: return the difference instead.
        say: gets a line where an earlier version recorded no fingerprint.

    Raises:
        PtmoeError: the folder records another fingerprint, or what recorded it is missing.
    """
    known, before = folder / ENVIRONMENT_FILE, None
    if known.exists():
        before = Environment.read(known).data
        if before is None:
            say(f"{known} records no fingerprint of the data: whether they are those of the first steps is not known")
            return {}
    elif not has_checkpoints(folder):  # interrupted before it was written, and before any training
        return {}
    elif not force:
        raise PtmoeError(
            f"{known} is missing, which says what data {folder} was trained on, and with what options: put it back, "
            f"{FORCE}, or choose another --output-dir"
        )
    if before == data:
        return {}
    if not force:
        record = recorded(folder)
        raise PtmoeError(
            f"{options.data or options.task} does not hold the data that {folder} was trained on (it names "
            f"{record.data or record.task}; the fingerprint of the tokens was {before}, is {data}): give those, {FORCE}"
            ", or choose another --output-dir"
        )
    return {"fingerprint of the data": (before, data)}


def check_base(checkpoint: Path, model: PromptedCausalLM, force: bool = False) -> Differences:
    """
    Raises:
        PtmoeError: the checkpoint is of an adapter on another base; with `force` only where its hidden size differs.
    """
    from ptmoe.adapters.folder import CONFIG_FILE as ADAPTER_CONFIG
    from ptmoe.adapters.folder import read_adapter
    from ptmoe.adapters.identity import BaseIdentity

    if not (checkpoint / ADAPTER_CONFIG).exists():  # sharded training keeps files of its own
        return {}
    saved, embedding = read_adapter(checkpoint).base, model.base_model.get_input_embeddings().weight
    try:
        model.check_saved(saved, checkpoint)
    except PtmoeError as error:
        if not force or embedding.shape[1] != saved.hidden_size:
            raise PtmoeError(f"{error}, or {FORCE}" if embedding.shape[1] == saved.hidden_size else error) from None
        return {"fingerprint of the base": (saved.mark, BaseIdentity.of(embedding).mark)}
    return {}


def check_checkpoint(checkpoint: Path, options: TrainOptions, force: bool = False) -> Differences:
    """
    Raises:
        PtmoeError: the run would end before its checkpoint; or other processes than now have made that, and from it
            steps are left: a step would read another number of batches.
    """
    state, steps = json.loads((checkpoint / "trainer_state.json").read_text()), options.max_steps
    name, end = ("max_steps", steps) if steps > 0 else ("num_train_epochs", options.num_train_epochs)
    done = state["global_step"] if steps > 0 else round(state["epoch"] or 0, 3)
    if done > end:
        raise PtmoeError(f"{name}={end:g}: {checkpoint} has {done:g}; give as many or more, or another --output-dir")
    before, now = len(list(checkpoint.glob(RANDOM_STATE.replace(".", "*.")))), world_size()
    if before in (0, now) or state["global_step"] >= state["max_steps"]:
        return {}
    if not force:
        raise PtmoeError(
            f"{checkpoint} was made by {before} process{'es' if before > 1 else ''}, and {now} would go on: a step "
            f"would read other examples; start {before}, {FORCE}, or choose another --output-dir"
        )
    return {"processes": (before, now)}
