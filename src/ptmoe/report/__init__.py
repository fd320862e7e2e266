"""From a comparison's folder, or one run's, to tables, figures and one HTML page."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptmoe.report.comparison import Comparison as Comparison
    from ptmoe.report.comparison import read_comparison as read_comparison
    from ptmoe.report.figures import routing_figures as routing_figures
    from ptmoe.report.page import write_report as write_report
    from ptmoe.report.page import write_run_report as write_run_report
    from ptmoe.report.summary import comparison_summary as comparison_summary
    from ptmoe.report.tuning import write_tuning_report as write_tuning_report

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
