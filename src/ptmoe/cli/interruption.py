"""Ctrl-C and SIGTERM in a command whose work can be continued."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ptmoe.cli.console import Console


@contextmanager
def ends_with_a_signal(command: str, console: Console) -> Iterator[None]:
    """Within it, either signal is a `KeyboardInterrupt`, so that workers are ended; then the command that continues is
    printed, and this one ends with the status that shells and schedulers expect."""
    ended_by = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal ended_by
        ended_by = signal.SIGTERM
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stopped:
        console.print(f"stopped; continue with: {command}")
        raise SystemExit(getattr(stopped.__cause__, "status", 128 + ended_by)) from None
    finally:
        signal.signal(signal.SIGTERM, before)
