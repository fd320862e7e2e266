"""Where a data set comes from: the user's folder or file, the released file with its MD5 verified, or the Hub.

Without `data_dir` these are tried: the folder in `$PTMOE_DATA_DIR`, earlier downloads (`$PTMOE_CACHE`, by default
`~/.cache/ptmoe`), the released file, the Hub.
"""

import hashlib
import http.client
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ptmoe.errors import PtmoeError
from ptmoe.files import cache_folder, hexdigest, replaced
from ptmoe.tasks.base import Split, Task
from ptmoe.tasks.records import Record

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
LARGEST = 2_000_000_000  # bytes of a download; no release has as many


def locate(task: Task, split: str, data_dir: str | Path | None, say: Callable[[str], None]) -> Path | None:
    """The file of a split, downloaded if necessary; None if it is to be read from the Hub.

    Raises:
        PtmoeError: it is nowhere to be found, or the download differs from the release.
    """
    if data_dir is not None:
        return in_folder(task, split, Path(data_dir))
    if present := local(task, split):
        return present
    wanted, tried = task.splits[split], ""
    if wanted.url:
        try:
            return fetch(wanted, say)
        except OSError as error:
            tried = f" ({wanted.url}: {error})"
    if task.hub is not None and wanted.hub:
        return None
    raise PtmoeError(
        f"{task.name} has no {split} split to download{tried}: give its file, or the folder that holds "
        f"{' or '.join(wanted.files[:3]) or 'it'}, with --data-dir"
    )


def local(task: Task, split: str) -> Path | None:
    """As `present`, unless a download has been changed since."""
    path, wanted = present(task, split), task.splits[split]
    if path is not None and wanted.url and path == cached(wanted):
        return path if hexdigest(path, hashlib.md5(usedforsecurity=False)) == wanted.md5 else None
    return path


def present(task: Task, split: str) -> Path | None:
    """The file on this machine, in `$PTMOE_DATA_DIR` or from an earlier download; None if there is none."""
    if folder := os.environ.get("PTMOE_DATA_DIR"):
        with suppress(PtmoeError):
            return in_folder(task, split, Path(folder))
    wanted = task.splits[split]
    return cached(wanted) if wanted.url and cached(wanted).is_file() else None


def in_folder(task: Task, split: str, place: Path) -> Path:
    """The split's file in a folder, or the file itself.

    Raises:
        PtmoeError: no such file or folder, or a folder without any of the split's file names.
    """
    names = task.splits[split].files
    if not names:
        raise PtmoeError(f"{task.name} has no {split} split in a file ({task.note}): omit --data-dir")
    if place.is_file():
        return place
    if not place.is_dir():
        raise PtmoeError(f"no data file or folder {place}: give the place of {task.name} with --data-dir")
    family, _, short = task.name.rpartition("/")
    folders = [place / task.name, place / short, *([place / family] if family else []), place]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file():
            return path
    raise PtmoeError(
        f"{place} holds no {split} split of {task.name}: looked for {', '.join(names)} "
        f"there and in {short}/; give the file itself with --data-dir"
    )


def cached(split: Split) -> Path:
    """Where a released file is kept after its download."""
    return cache_folder() / f"{split.md5}.jsonl.gz"


def fetch(split: Split, say: Callable[[str], None]) -> Path:
    """Download a released file, and keep it if its MD5 is the release's.

    Raises:
        PtmoeError: its MD5 differs, or it is larger than any release; nothing is kept.
        OSError: the server cannot be reached or does not have it.
    """
    target, digest, received = cached(split), hashlib.md5(usedforsecurity=False), 0
    cache_folder(create=True)
    say(f"downloading {split.url}")
    with replaced(target) as partial:
        with urllib.request.urlopen(split.url, timeout=_TIMEOUT) as answer, partial.open("wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            with suppress(http.client.IncompleteRead):  # shorter than announced: reported below
                while chunk := answer.read(_CHUNK):
                    received += len(chunk)
                    if max(received, length) > LARGEST:
                        raise PtmoeError(f"{split.url}: over {LARGEST:,} bytes, more than any release; nothing is kept")
                    file.write(chunk)
                    digest.update(chunk)
        if digest.hexdigest() != split.md5:
            short = f" after {received:,} of {length:,} bytes" if received < length else ""
            raise PtmoeError(
                f"{split.url}: the download has MD5 {digest.hexdigest()}{short}, the release {split.md5}; nothing is "
                "kept. Try again, or give a copy of your own with --data-dir"
            )
    return target


def hub_rows(task: Task, split: str) -> Iterator[Record]:
    """The rows of a copy on the Hub, read from the cache of `datasets`.

    Raises:
        PtmoeError: the Hub does not provide it.
    """
    from datasets import load_dataset

    hub, name = task.hub, task.splits[split].hub
    assert hub is not None
    try:
        rows: Any
        try:
            rows = load_dataset(hub.repository, hub.config, split=name)
        except RuntimeError as error:  # a script, which `datasets` no longer runs; the Hub keeps what it made
            if "scripts are no longer supported" not in str(error):
                raise
            rows = load_dataset(hub.repository, data_dir=hub.config, split=name, revision="refs/convert/parquet")
        if hub.where is not None:
            column, value = hub.where
            rows = rows.filter(lambda entry: entry == value, input_columns=[column])
        if hub.columns:
            rows = rows.select_columns(list(hub.columns))
    except Exception as error:  # its loaders raise exceptions of any kind
        reason = " ".join(str(error).split())[:300]
        raise PtmoeError(
            f"the Hub's {hub.repository} ({name}) cannot be loaded ({reason}): give the data with --data-dir"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{hub.repository}, row {number}", row


def on_hub_disk(task: Task) -> bool:
    """Whether the task's copy is in the cache of `datasets`."""
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    return task.hub is not None and (folder / task.hub.repository.replace("/", "___").lower()).is_dir()
