"""The software and hardware of a run, and which of its processes this is."""

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ptmoe.runs.records import Environment

PACKAGES = "ptmoe torch transformers peft accelerate bitsandbytes datasets safetensors tokenizers numpy".split()


def environment(seed: int, fast_paths: dict[str, str | None] | None = None) -> Environment:
    """Versions, the project's commit where it is a checkout, the seed, the hardware and the fast paths in use."""
    import torch

    return Environment(
        versions=versions(),
        commit=_commit(),
        seed=seed,
        hardware={
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        fast_paths=fast_paths,
    )


def moved(before: Environment, now: Environment) -> dict[str, tuple[Any, Any]]:
    """The versions, commit, processor and accelerator that differ, by name: what may change a run's numbers."""
    first, second = (
        {f"version of {name}": version for name, version in one.versions.items()}
        | {"commit": one.commit}
        | {name: one.hardware.get(name) for name in ("processor", "accelerator")}
        for one in (before, now)
    )
    return {name: (first[name], second[name]) for name in second if name in first and first[name] != second[name]}


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide a run."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _commit() -> str | None:
    """Of the checkout that holds this file; none where another repository only encloses the installation."""
    here = Path(__file__)
    with suppress(OSError, subprocess.CalledProcessError):
        for command in (["git", "ls-files", "--error-unmatch", here.name], ["git", "rev-parse", "HEAD"]):
            done = subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def peak_memory() -> Callable[[], int | None]:
    """Begins to watch the memory, and returns what says the most bytes held since: allocated on a GPU, resident of this
    process on a CPU; None where the system does not say."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated
    with suppress(OSError, AttributeError):  # glibc's; what an earlier run freed, and the heap kept, would count
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident; see proc(5)
    except OSError:
        return lambda: None
    return _resident_peak


def _resident_peak() -> int | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else None


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
