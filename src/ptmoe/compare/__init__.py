"""Methods side by side on equal terms: a plan, its cells, and what they cost."""

import importlib
from typing import Any

_HOMES = {
    "ComparePlan": "plan",
    "compare": "run",
    "fit_budget": "budget",
    "parse_budget": "plan",
    "prepare": "run",
    "read_plan": "plan",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe.compare' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.compare.{_HOMES[name]}"), name)
