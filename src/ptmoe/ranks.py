"""How many processes share the work and which one this is, as `torchrun` and `accelerate launch` say it; no torch."""

import os


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
