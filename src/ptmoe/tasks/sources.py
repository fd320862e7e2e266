"""Where a data set comes from: the user's folder or file, the released file with its MD5 verified, or the Hub.

Without `data_dir` these are tried: the folder in `$PTMOE_DATA_DIR`, earlier downloads (`$PTMOE_CACHE`, by default
`~/.cache/ptmoe`), the released file, the Hub.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptmoe.errors import PtmoeError
from ptmoe.files import cache_folder, replaced
from ptmoe.tasks.base import Hub, Split, Task
from ptmoe.tasks.records import Record

_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Source:
    """A file, or the rows of a copy on the Hub."""

    path: Path | None = None
    hub: Hub | None = None
    split: str = ""

    def __str__(self) -> str:
        return str(self.path) if self.path else f"the Hub's {self.hub.repository if self.hub else ''} ({self.split})"


def locate(task: Task, split: str, data_dir: str | Path | None, say: Callable[[str], None]) -> Source:
    """Where a split is read from; it is downloaded if necessary.

    Raises:
        PtmoeError: it is nowhere to be found, or the download differs from the release.
    """
    wanted = task.splits[split]
    if data_dir is not None:
        return Source(in_folder(task, split, Path(data_dir)))
    present = local(task, split)
    if present is not None:
        return Source(present)
    tried = []
    if wanted.url:
        target = cached(wanted)
        try:
            fetch(wanted.url, target, wanted.md5, say)
            return Source(target)
        except OSError as error:
            tried.append(f"{wanted.url}: {error}")
    if task.hub is not None and wanted.hub:
        return Source(hub=task.hub, split=wanted.hub)
    reasons = f" ({'; '.join(tried)})" if tried else ""
    raise PtmoeError(
        f"{task.name} has no {split} split to download{reasons}: give its file, or the folder that holds "
        f"{' or '.join(wanted.files[:3]) or 'it'}, with --data-dir"
    )


def local(task: Task, split: str) -> Path | None:
    """The file on this machine, in `$PTMOE_DATA_DIR` or from an earlier download; None if there is none."""
    folder = os.environ.get("PTMOE_DATA_DIR")
    if folder:
        with suppress(PtmoeError):
            return in_folder(task, split, Path(folder))
    wanted = task.splits[split]
    return cached(wanted) if wanted.url and cached(wanted).exists() else None


def in_folder(task: Task, split: str, place: Path) -> Path:
    """The split's file in a folder, or the file itself.

    Raises:
        PtmoeError: no such file or folder, or a folder without any of the split's file names.
    """
    names = task.splits[split].files
    if not names:
        raise PtmoeError(f"{task.name} has no {split} split in a file ({task.note}): leave --data-dir out")
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


def fetch(url: str, target: Path, md5: str, say: Callable[[str], None]) -> None:
    """Download a file, and keep it if it is the released file.

    Raises:
        PtmoeError: its MD5 differs from the release's; nothing is kept.
        OSError: the server cannot be reached or does not have it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, received = hashlib.md5(usedforsecurity=False), 0
    say(f"downloading {url}")
    with replaced(target) as partial:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, partial.open("wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            with suppress(http.client.IncompleteRead):  # shorter than announced: reported below
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
        if digest.hexdigest() != md5:
            short = f" after {received:,} of {length:,} bytes" if received < length else ""
            raise PtmoeError(
                f"{url}: the download has MD5 {digest.hexdigest()}{short}, the release {md5}; nothing is kept. "
                "Try again, or give a copy of your own with --data-dir"
            )


def hub_rows(source: Source) -> Iterator[Record]:
    """The rows of a copy on the Hub, read from the cache of `datasets`.

    Raises:
        PtmoeError: the Hub does not provide it.
    """
    from datasets import load_dataset

    assert source.hub is not None
    hub = source.hub
    try:
        rows: Any = load_dataset(hub.repository, hub.config, split=source.split)
        if hub.where is not None:
            column, value = hub.where
            rows = rows.filter(lambda entry: entry == value, input_columns=[column])
        if hub.columns:
            rows = rows.select_columns(list(hub.columns))
    except Exception as error:  # its loaders raise exceptions of any kind
        reason = " ".join(str(error).split())[:300]
        raise PtmoeError(f"{source} cannot be had ({reason}): give the data with --data-dir") from None
    for number, row in enumerate(rows, 1):
        yield f"{hub.repository}, row {number}", row


def on_hub_disk(task: Task) -> bool:
    """Whether the task's copy is in the cache of `datasets`."""
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return task.hub is not None and (folder / task.hub.repository.replace("/", "___").lower()).is_dir()
