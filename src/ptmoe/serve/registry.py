"""The adapters that are served: found in a folder, by name, and in memory as far as a bound in bytes allows.

    adapters/
        qa/        adapter folder, or run folder that holds one     served as "qa"
        sql/
        broken/    listed with the reason, and not served

The folder is polled. What a request gets is composed once, when it begins, so replacing or removing an adapter touches
no running request.
"""

import logging
import math
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ptmoe.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, local_folder
from ptmoe.errors import PtmoeError, near
from ptmoe.models.adapter_set import BASE, AdapterSet
from ptmoe.runs.folders import CONFIG_FILE as RUN_FILE
from ptmoe.runs.folders import trained_with_chat
from ptmoe.serve.engine import Input, UnavailableError

POLL = 2.0  # seconds between looks at the folder, at least
SHARE = 20  # and at least this many times as long as a look takes
NEAR_NAMES = 3
LONGEST_NAME = 256
ABSOLUTE = re.compile(r"(?<![\w./])/[^\s()'\",;:]+")  # a path in a text

log = logging.getLogger(__name__)


class UnknownModelError(PtmoeError):
    """No adapter of this name is served."""


@dataclass
class Entry:
    """An adapter in the folder."""

    folder: Path  # where it was found
    stamp: tuple[int, ...]  # the times and sizes of its files: another stamp is another adapter
    key: str | None = None  # its name in the `AdapterSet`; None while it is not in memory
    size: int = 0  # bytes, once it has been read
    fixed: bool = False  # whether an expert's prompt is the same for each input
    chat: bool | None = None  # whether it was trained in the chat template; None where its folder does not say
    error: str | None = None  # why it is not served; None otherwise
    retry: float = math.inf  # from when on a request may try to read it again, in seconds of `time.monotonic`


@dataclass(frozen=True)
class Composed:
    """A row for an engine, and how it was routed: the gate `(N,)`, None for a method that does not route."""

    row: Input
    gate: list[float] | None

    @property
    def expert(self) -> int | None:
        """The expert with the highest gate."""
        return None if self.gate is None else max(range(len(self.gate)), key=self.gate.__getitem__)


class Registry:
    """Adapters by name. All methods may be called from any thread.

    Args:
        adapters: of the base, holding none; it is the registry's from now on.
        folder: of adapter folders, or one adapter or run folder, which is then served under its own name.
        base: the name under which the base itself is served.
        memory: bytes of adapters to hold at most, the least recently used ones make room; None without a bound.
    """

    def __init__(self, adapters: AdapterSet, folder: str | Path | None, *, base: str, memory: int | None = None):
        self.adapters = adapters
        self.base = base
        self.memory = memory
        # Absolute: what is missing under a relative path could be the name of a repository on the Hub.
        self.folder = None if folder is None else Path(folder).absolute()
        self._entries: dict[str, Entry] = {}
        self._in_memory: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self.bytes_in_memory = 0
        self._withdrawn: set[str] = set()
        self._seen: dict[str, tuple[int, ...]] = {}
        self._keys = count()
        self._lock = threading.RLock()
        self._looking = threading.Lock()  # taken first: an older look must not undo what a newer one has found
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self.scan(settled=True)

    # -- names -------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The base and the adapters that are served."""
        with self._lock:
            served = (name for name, entry in self._entries.items() if entry.error is None)
            return [self.base, *sorted(set(served) - self._withdrawn)]

    def listing(self) -> dict[str, dict[str, Any]]:
        """Every adapter that was found, with what is known of it."""
        with self._lock:
            return {
                name.encode(errors="backslashreplace").decode(): {
                    "served": entry.error is None and name not in self._withdrawn,
                    "in_memory": entry.key is not None,
                    "bytes": entry.size,
                    **({} if entry.error is None else {"error": entry.error}),
                }
                for name, entry in sorted(self._entries.items())
            }

    def created(self, name: str) -> int:
        """When the adapter was written, in seconds since 1970; 0 for the base."""
        with self._lock:
            return self._entries[name].stamp[0] // 10**9 if name in self._entries else 0

    def entry(self, name: str) -> Entry | None:
        """The adapter of this name; None for the base.

        Raises:
            UnknownModelError: neither is served under it.
            UnavailableError: the system did not let it be read a moment ago.
        """
        if name == self.base:
            return None
        with self._lock:
            entry = self._entries.get(name)
        if entry is None or name in self._withdrawn:
            advice = near(name, self.names(), most=NEAR_NAMES, otherwise="; GET /v1/models lists what is served")
            raise UnknownModelError(f"no model {name[:LONGEST_NAME]!r}{advice}")
        if entry.error is not None and time.monotonic() < entry.retry:
            kind = UnknownModelError if entry.retry == math.inf else UnavailableError
            raise kind(f"the adapter {name!r} cannot be served: {entry.error}")
        return entry

    # -- composing ---------------------------------------------------------------------------------------------------

    @property
    def embedding(self) -> Tensor:
        """`(V, H)`."""
        return cast(Tensor, self.adapters.embedding.weight)

    def ready(self, name: str) -> Entry | None:
        """The adapter of this name, once it has been read; None for the base. One that replaces it is another object.

        Raises:
            UnknownModelError, UnavailableError: as `entry`, also of one that turns out to be broken when it is read.
        """
        while (entry := self.entry(name)) is not None and entry.key is None:  # or replaced in the meantime
            self._load(name, entry)
        return entry

    @torch.no_grad()
    def compose(self, name: str, token_ids: list[int]) -> Composed:
        """The row of these tokens behind the prompt of an adapter, or behind none for the base.

        Raises:
            UnknownModelError, UnavailableError: as `ready`.
        """
        ids = torch.tensor([token_ids], device=self.embedding.device)
        while True:
            entry = self.ready(name)
            with self._lock:
                key = None if entry is None else entry.key
                if entry is not None and key is None:
                    continue  # replaced or evicted in the meantime
                if entry is not None:
                    self._in_memory.move_to_end(name)
                spliced, prompts = self.adapters.compose(ids, adapter_names=[key or BASE])
            routing = prompts.routing
            gate = None if routing is None else routing.gate[0].tolist()
            composed = Composed(Input(spliced.embeds[0], token_ids, changes=prompts.changes), gate)
            if entry is None or not entry.fixed:
                return composed
            return Composed(Input(spliced.embeds[0], token_ids, prefix=(key, composed.expert)), gate)

    def _load(self, name: str, entry: Entry) -> None:
        key, fault = f"adapter{next(self._keys)}", None
        try:
            self.adapters.load(entry.folder, key)
            chat = trained_with_chat(entry.folder)
        except (PtmoeError, OSError) as error:
            fault = error
        if _stamp(entry.folder) not in (entry.stamp, None):  # what was read may be half of one and half of another
            fault = OSError("its files have changed, and may still be written")
        if fault is not None:
            refused = isinstance(fault, OSError) or isinstance(fault.__cause__, OSError)
            with self._lock:
                if key in self.adapters.encoders:
                    self.adapters.remove(key)
                if entry.key is not None:
                    return  # another thread could read it
                # The reason may name files, and a base by its folder, which are not the clients' business.
                entry.error = ABSOLUTE.sub(lambda path: Path(path[0]).name, str(fault).replace(str(entry.folder), name))
                entry.retry = time.monotonic() + POLL if refused else math.inf
            log.warning("adapter %r is skipped: %s", name, entry.error)
            return
        encoder = self.adapters[key]
        with self._lock:
            if entry.key is not None or self._entries.get(name) is not entry:
                self.adapters.remove(key)  # another thread was faster, or it has been replaced
                return
            entry.size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.state_dict().values())
            entry.chat = chat
            entry.fixed = encoder.fixed_prompts() is not None
            entry.key, entry.error = key, None
            self._in_memory[name] = entry
            self.bytes_in_memory += entry.size
            while self.memory is not None and self.bytes_in_memory > self.memory and len(self._in_memory) > 1:
                self._forget(next(iter(self._in_memory)))

    def _forget(self, name: str) -> None:
        entry = self._in_memory.pop(name, None)
        if entry is not None and entry.key is not None:
            self.adapters.remove(entry.key)
            self.bytes_in_memory -= entry.size
            entry.key = None

    # -- the folder --------------------------------------------------------------------------------------------------

    def scan(self, *, settled: bool = False) -> None:
        """Look at the folder. A change counts once it is found twice, when nobody is writing any more, or `settled`."""
        with self._looking:
            found = self._find()
            with self._lock:
                for name in sorted(self._entries.keys() | found.keys()):
                    if settled or name not in found or self._seen.get(name) == found[name][1]:
                        self._take(name, found.get(name))
                self._seen = {name: stamp for name, (_, stamp) in found.items()}

    def _take(self, name: str, found: tuple[Path, tuple[int, ...]] | None) -> None:
        """What was found under this name, if anything, is what is served under it from now on."""
        known = self._entries.get(name)
        if known is not None and found is not None and known.stamp == found[1]:
            return
        self._forget(name)
        self._entries.pop(name, None)
        if found is not None:
            self._entries[name] = Entry(*found, error=(unfit := self._unfit(name)))
            if unfit is not None:
                log.warning("adapter %r is skipped: %s", name, unfit)

    def _unfit(self, name: str) -> str | None:
        if name == self.base:
            return "it has the name of the base: rename its folder"
        if not name.isprintable() or len(name) > LONGEST_NAME:
            return f"its name is not printable, or longer than {LONGEST_NAME} characters: rename its folder"
        return None

    def _find(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        if self.folder is None:
            return {}
        found = {}
        try:
            for path in self.folder.iterdir():
                stamp = None if hidden(path) else _stamp(path)
                if stamp is not None:
                    found[path.name] = (path, stamp)
        except OSError as error:
            log.warning("the adapters' folder cannot be read: %s", error)
            return {name: (entry.folder, entry.stamp) for name, entry in self._entries.items()}
        own = _stamp(self.folder)
        # A run folder holds "adapter", and so may a folder of adapters.
        if own is not None and ((self.folder / CONFIG_FILE).exists() or found.keys() <= {"adapter"}):
            return {self.folder.resolve().name: (self.folder, own)}
        return found

    def fill(self) -> None:
        """Read the adapters that have not been read, as far as the memory allows."""
        for name, entry in list(self._entries.items()):
            size = entry.stamp[-1]
            if self._stopping.is_set() or (self.memory is not None and self.bytes_in_memory + size > self.memory):
                return
            if entry.key is None and entry.error is None and not entry.size and name not in self._withdrawn:
                started = time.monotonic()
                self._load(name, entry)
                self._stopping.wait(time.monotonic() - started)  # requests come first

    def add(self, name: str) -> None:
        """Serve what is now in the folder under this name, at once.

        Raises:
            UnknownModelError: there is nothing of that name, or it is broken.
            PtmoeError: it is the base.
        """
        self._check_not_base(name)
        with self._looking:
            found = self._find().get(name)  # of others, somebody may still be writing
            with self._lock:
                self._withdrawn.discard(name)
                if name in self._entries and self._entries[name].error is not None:
                    del self._entries[name]  # what was wrong may lie where no file's time shows that it was mended
                self._take(name, found)
        entry = self.entry(name)
        if entry is not None and entry.key is None:
            self._load(name, entry)
            self.entry(name)

    def withdraw(self, name: str) -> None:
        """Serve this adapter no more, until `add`; its folder stays as it is.

        Raises:
            PtmoeError: it is the base, or no such adapter is served.
        """
        self._check_not_base(name)
        with self._lock:
            if name not in self._entries:
                self.entry(name)
            self._withdrawn.add(name)
            self._forget(name)

    def _check_not_base(self, name: str) -> None:
        if name == self.base:
            raise PtmoeError(f"{name!r} is the base: it stays as long as the server")

    def watch(self) -> None:
        """Poll the folder in a thread of its own, until `stop`."""

        def poll() -> None:
            pause = POLL  # the first requests come first
            while not self._stopping.wait(pause):
                started = time.monotonic()
                try:
                    self.scan()
                    pause = max(POLL, SHARE * (time.monotonic() - started))
                    self.fill()
                except Exception:  # a device without memory, …: the next look may do better
                    log.exception("the adapters' folder cannot be followed")

        self._watcher = threading.Thread(target=poll, name="ptmoe-adapters", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()


def hidden(folder: Path) -> bool:
    """Whether it is passed over, as what is being written or was put aside."""
    return folder.name.startswith(".")


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """When what an adapter is read from was changed, and how large it is; None where it has no file of its own."""
    try:
        inner = local_folder(folder)
    except PtmoeError:
        return None
    config, run, weights = map(_about, (inner / CONFIG_FILE, folder / RUN_FILE, inner / WEIGHTS_FILE))
    # A folder's time tells of files that were added and deleted.
    return (*config, *run, *_about(inner)[:2], *weights) if any((*config, *weights)) else None


def _about(path: Path) -> tuple[int, int, int]:
    """The time of its last change, which file it is, and its bytes; zeros where there is none."""
    try:
        about = path.stat()
    except OSError:
        return 0, 0, 0
    return about.st_mtime_ns, about.st_ino, about.st_size
