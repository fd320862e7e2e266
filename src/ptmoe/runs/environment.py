"""What a run runs on, and which of its processes this is."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ptmoe.runs.records import Environment

PACKAGES = (
    "ptmoe",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


def environment(seed: int, fast_paths: dict[str, str | None] | None = None) -> Environment:
    """Versions, the project's commit where it is a checkout, the seed, the hardware and the fast paths in use."""
    import torch

    return Environment(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
