"""Checkpoint folders that are there whole or not at all, and that are checked before a run resumes from one.

`checkpoint-N` is written under another name, with the SHA-256 of its files, synced to the disk and renamed. So a kill
or a full disk in the middle of a save leaves the earlier ones as they were, and what changed later is noticed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ptmoe.errors import PtmoeError
from ptmoe.files import sha256

MANIFEST = "sha256.json"
RANDOM_STATE = "random_state.json"  # of several processes, one for each: `random_state.0.json`
PARTIAL = ".partial"  # where a checkpoint is written


def seal(folder: Path) -> None:
    """Record the SHA-256 of a checkpoint's files, and wait until all of it is on the disk."""
    digests = {
        path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1))
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def publish(folder: Path, target: Path) -> None:
    """Give a sealed checkpoint its name; one that has it already, of an earlier try, is replaced."""
    before = folder.with_name(f"{folder.name}.before")
    if target.exists():
        if before.exists():  # of a kill at the end of this
            shutil.rmtree(before)
        target.rename(before)  # removing it takes a while, in which a kill would leave neither
    folder.rename(target)
    _sync(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it lacks {MANIFEST}: it was not written to its end, or by an earlier version"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(digests, dict) or not digests:
        return f"{MANIFEST} names no file"
    for name, digest in digests.items():
        path = folder / str(name)
        if not path.is_file():
            return f"it lacks {name}"
        if sha256(path) != digest:
            return f"{name} was changed after it was written"
    return None


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by step, newest first."""
    named = (re.fullmatch(r"checkpoint-(\d+)", path.name, re.ASCII) for path in folder.glob("checkpoint-*"))
    return sorted(((int(name[1]), folder / name[0]) for name in named if name), reverse=True)


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the newest in a folder that is as it was written; None where there is none at all.
    `say` gets a line for each newer one that cannot be used.

    Raises:
        PtmoeError: there are checkpoints, and none can be used.
    """
    found = numbered(folder)
    reason: str | None = None
    for _, checkpoint in found:
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        say(f"{checkpoint} is passed over: {reason}")
    if found:
        raise PtmoeError(
            f"no checkpoint in {folder} can be used ({found[-1][1].name}: {reason}): train in another folder"
        )
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
