"""From finished run folders, or a comparison of many, to tables, figures and one HTML page."""

import importlib
from typing import Any

# matplotlib and jinja2 are the optional part `report`: a table needs neither, so nothing is imported before its use.
_HOMES = {
    "Comparison": "comparison",
    "Run": "runs",
    "read_comparison": "comparison",
    "read_run": "runs",
    "read_runs": "runs",
    "comparison_summary": "summary",
    "comparison_table": "table",
    "nearest_tokens": "vocabulary",
    "write_comparison_report": "comparison_html",
    "write_report": "html",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptmoe.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptmoe.report.{_HOMES[name]}"), name)
