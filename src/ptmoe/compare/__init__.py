"""Methods side by side on equal terms: a plan, its cells, and what they cost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptmoe.compare.budget import fit_budget as fit_budget
    from ptmoe.compare.plan import ComparePlan as ComparePlan
    from ptmoe.compare.plan import parse_budget as parse_budget
    from ptmoe.compare.plan import read_plan as read_plan
    from ptmoe.compare.run import compare as compare
    from ptmoe.compare.run import prepare as prepare

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
