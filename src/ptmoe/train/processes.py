"""The processes of one run: they begin alike, and none waits for ever for one that is frozen or gone.

A collective operation waits for all processes, so one that is stopped would hold the others in it. Each process counts
up in the store that the launcher gives them. A thread does it, and ends its process, with an error in words, when
another has not counted for a while; how long a step, a save or a compilation takes does not matter.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ptmoe.errors import PtmoeError
from ptmoe.runs.environment import rank, versions, world_size

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

TIMEOUT = 60.0  # `ddp_timeout` of a run's `trainer` replaces it
START = 5  # times as long, for one that has given none yet
ALONE = (
    "{} processes were started, but each would run alone: start them with torchrun, accelerate launch or --launch, and "
    "leave use_cpu as it is"
)
RESUME = "when it can run again, continue with --resume"


def on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """The arguments of a process that trains on one GPU, though it sees several: `Trainer` would copy the base to each
    of them at every step."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
        warnings.warn("one process trains on one of the GPUs: --launch N starts one for each of N", stacklevel=2)
    return arguments


class Processes:
    """The processes that train, or evaluate, together. With one process nothing is done.

    Args:
        option: what decides the run, in this process: the same in all.
        timeout: seconds without a sign of another process.

    Raises:
        PtmoeError: a launcher was asked for several processes, and this is the only one.
    """

    def __init__(self, option: dict[str, Any], timeout: float = TIMEOUT) -> None:
        self.option, self.timeout = option, timeout
        self.rank, self.count = rank(), world_size()
        if self.count == 1 and "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
            raise PtmoeError(
                "accelerate launch was asked for several processes and started one, as it does without --multi_gpu on "
                "a machine that it knows no accelerator of: add --multi_gpu, which works on CPUs as well, or use "
                "torchrun or --launch"
            )
        self._store: Any = None
        self._questions = 0
        self._stopped = threading.Event()

    def __enter__(self) -> Self:
        if self.count > 1:
            # The store of torchrun and accelerate is there already; another launcher's comes with the process group.
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self.join()
            self.agree()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.leave()
        if self.count > 1 and isinstance(error, RuntimeError) and re.search("gloo|nccl|onnection", str(error)):
            raise PtmoeError(
                f"another of the {self.count} processes ended or cannot be reached "
                f"({' '.join(str(error).split())[:200]}): see what it printed; {RESUME}"
            ) from None

    def join(self) -> torch.device:
        """Make the process group, where there is none yet.

        Returns:
            The device of this process.

        Raises:
            PtmoeError: the processes do not form one group.
        """
        import torch
        from accelerate import PartialState

        options: dict[str, Any] = {"timeout": timedelta(seconds=self.timeout)} if self.count > 1 else {}
        state = PartialState(cpu=not torch.accelerator.is_available(), **options)
        if state.num_processes != self.count:
            raise PtmoeError(ALONE.format(self.count))
        device: torch.device = state.device
        return device

    def agree(self, **facts: Any) -> None:
        """Wait for the other processes and compare what they say; the first time also versions and options.

        Raises:
            PtmoeError: a process says something else than process 0.
        """
        if self.count == 1:
            return
        if self._store is None:
            facts |= {"version": versions(), "option": self.option}
            self._connect()
        self._questions += 1
        keys = [f"{self._questions}/{other}" for other in range(self.count)]
        try:
            self._store.set(keys[self.rank], json.dumps(facts, default=str))
            while not self._store.check(keys):  # if one is frozen, the thread ends this process
                time.sleep(0.05)
            said = [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:
            raise PtmoeError(f"{self._lost()} ({error})") from None
        for other, its in enumerate(said):
            if differing := differences(said[0], its):
                raise PtmoeError(
                    f"process {other} of {self.count} differs from process 0 ({', '.join(differing)}): start all with "
                    "the same packages, options and data"
                )

    def part(self) -> None:
        """Wait for the others, and end the process group."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()
            self.leave()
            torch.distributed.destroy_process_group()

    def leave(self) -> None:
        """Others may end from now on, and this process is no longer missed once all have left."""
        self._stopped.set()

    def _connect(self) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # A connection of its own: that of the process group is busy while a collective operation waits.
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise PtmoeError(f"{self._lost()} ({error})") from None
        self._store = PrefixStore(f"ptmoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        others = [other for other in range(self.count) if other != self.rank]
        before = time.monotonic()
        signs: dict[int, bytes | None] = dict.fromkeys(others)
        last = dict.fromkeys(others, before)
        for beat in itertools.count():  # the first at once: one that froze before it would be taken for a late start
            if beat and self._stopped.wait(self.timeout / 10):
                return
            try:
                self._store.set(f"beat/{self.rank}", str(beat))
                for other in others:
                    key = f"beat/{other}"
                    sign = self._store.get(key) if self._store.check([key]) else None
                    if sign != signs[other]:
                        signs[other], last[other] = sign, time.monotonic()
            except RuntimeError:
                self._end(self._lost())
            now = time.monotonic()
            if now - before > self.timeout / 2:  # this process was stopped, perhaps all were
                last = dict.fromkeys(others, now)
            before = now
            for other in others:
                limit = self.timeout * (1 if signs[other] else START)
                if now - last[other] > limit:
                    self._end(
                        f"process {other} of {self.count} has given no sign for {limit:g} s (`ddp_timeout`): it is "
                        f"frozen, or its machine is gone; {RESUME}"
                    )

    def _end(self, message: str) -> None:
        if not self._stopped.is_set():
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(PtmoeError.status)  # the main thread waits in a collective operation, which nothing interrupts

    def _lost(self) -> str:
        return "the store that the processes share, of the launcher or of process 0, no longer answers"


def differences(first: dict[str, Any], other: dict[str, Any], name: str = "") -> list[str]:
    """Where two nested mappings differ, each as a sentence."""
    found = []
    for key in dict.fromkeys([*first, *other]):
        before, now = first.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{name}{key} ")
        elif before != now:
            found.append(f"{name}{key} is {now!r}, not {before!r}")
    return found
