"""Whether a run may be resumed: with the base, the method, the data and the options that its folder records.

Whatever was not given is taken from the record. All checks come before anything is written. With `--force` what differs
is taken as it is given, and both values are recorded with the step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptmoe.errors import PtmoeError
from ptmoe.models.bases import commit_of
from ptmoe.runs.folders import CONFIG_FILE, ENVIRONMENT_FILE
from ptmoe.runs.records import Environment
from ptmoe.train.options import TrainOptions, method_config

if TYPE_CHECKING:
    from ptmoe.models.causal import PromptedCausalLM

# Options that decide nothing about the training. Where the data lie may change: what they hold may not (`check_data`).
FREE = {
    *("output_dir", "data", "data_dir", "skip_bad", "token_cache", "logging_steps", "report_to"),
    *("save_steps", "save_total_limit", "eval_task", "eval_data_dir", "eval_examples", "eval_batch_size"),
    *("max_new_tokens", "score", "forgetting", "fsdp"),
}
FORCE = "go on as you say with --force, which records both"
Differences = dict[str, tuple[Any, Any]]  # by name, the recorded and the given value
RESOLVED = {"chat", "learning_rate", "revision"}  # None stands for what the run chose, which its record has


def recorded(folder: Path, **changes: Any) -> TrainOptions:
    """The options of a run that was interrupted; `changes` take precedence.

    Raises:
        PtmoeError: there is none, or the changes do not fit.
    """
    if not (folder / CONFIG_FILE).exists():
        raise PtmoeError(f"{folder} holds no run to resume ({CONFIG_FILE} is missing)")
    return TrainOptions.read(folder / CONFIG_FILE, **changes)


def continued(options: TrainOptions, folder: Path, force: bool = False) -> tuple[TrainOptions, Differences]:
    """The recorded options of a run, with those of `options` that may change, or by force with all; and what differs.

    Raises:
        PtmoeError: an option that was given differs from the record; all that do are named. The method itself cannot be
            changed even by force.
    """
    record = recorded(folder)
    given = options.model_dump(include=options.model_fields_set)
    if given.get("revision") is not None:  # the record has the commit
        given["revision"] = commit_of(options.model, given["revision"])
    was = record.model_dump()
    differing: Differences = {
        name: (was[name], value)
        for name, value in given.items()
        if name not in FREE | {"method"} and value != was[name] and not (name in RESOLVED and value is None)
    }
    if "method" in given:
        method, before = method_config(options.method), method_config(record.method).model_dump()
        if options.method["name"] != record.method["name"]:
            differing["method"], force = (record.method["name"], options.method["name"]), False
        else:
            asked = method.model_dump(include=method.model_fields_set)
            differing |= {name: (before[name], value) for name, value in asked.items() if value != before[name]}
    if differing and not force:
        places = [name for name in ("data", "data_dir") if name in given and given[name] != was[name]]
        differing |= {name: (was[name], given[name]) for name in places}
        changes = ", ".join(f"{name} was {before!r}, is {value!r}" for name, (before, value) in differing.items())
        otherwise = "" if "method" in differing else f", {FORCE}"
        raise PtmoeError(
            f"{folder} was trained otherwise ({changes}): continue it as it was, with `ptmoe train --resume "
            f"--output-dir {folder}`{otherwise}, or choose another --output-dir"
        )
    changed = {name: value for name, value in given.items() if name in FREE or name in differing}
    fields = {name: value for name, (_, value) in differing.items() if name not in given}  # those of the method
    return record.replace(**changed, method={**record.method, **fields}), differing


def check_data(folder: Path, data: str, options: TrainOptions, force: bool = False) -> Differences:
    """
    Args:
        folder: of the run.
        data: the fingerprint of its data as they are now.
        options: which say where that is.
        force: return the difference instead.

    Raises:
        PtmoeError: the folder records another fingerprint.
    """
    if not (folder / ENVIRONMENT_FILE).exists():  # interrupted before it was written, and before any training
        return {}
    before = Environment.read(folder / ENVIRONMENT_FILE).data
    if before is None or before == data:
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
    from ptmoe.adapters.identity import fingerprint

    if not (checkpoint / ADAPTER_CONFIG).exists():  # sharded training keeps files of its own
        return {}
    saved, embedding = read_adapter(checkpoint).base, model.base_model.get_input_embeddings().weight
    try:
        saved.check(embedding, checkpoint, model.name_or_path)
    except PtmoeError as error:
        if not force or embedding.shape[1] != saved.hidden_size:
            raise PtmoeError(f"{error}, or {FORCE}" if embedding.shape[1] == saved.hidden_size else error) from None
        marks = (saved.fingerprint or {}, fingerprint(embedding))
        first, second = (hashlib.sha256(repr(mark).encode()).hexdigest()[:16] for mark in marks)
        return {"fingerprint of the base": (first, second)}
    return {}
