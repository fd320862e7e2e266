"""PT-MoE's published figures (`paper.json`, from arXiv:2505.09519)."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def paper() -> dict[str, Any]:
    """The published figures, as they are shipped."""
    facts: dict[str, Any] = json.loads(files("ptmoe.report").joinpath("paper.json").read_text(encoding="utf-8"))
    return facts


def source() -> str:
    return f"published: {paper()['source']}, {paper()['base']}"
