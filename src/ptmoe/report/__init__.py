"""From finished run folders to a table, figures and one HTML page."""

import importlib
from typing import Any

# matplotlib and jinja2 are the optional part `report`: a table needs neither, so nothing is imported before its use.
_HOMES = {
    "Run": "runs",
    "read_run": "runs",
    "read_runs": "runs",
    "comparison_table": "table",
    "write_report": "html",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.report.{_HOMES[name]}"), name)
