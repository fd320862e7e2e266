"""From a comparison's folder, or one run's, to tables, figures and one HTML page."""

import importlib
from typing import Any

# matplotlib and jinja2 are the optional part `report`, which the terminal's table does not need.
_HOMES = {
    "Comparison": "comparison",
    "comparison_summary": "summary",
    "read_comparison": "comparison",
    "routing_figures": "figures",
    "write_report": "page",
    "write_run_report": "page",
    "write_tuning_report": "tuning",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.report.{_HOMES[name]}"), name)
