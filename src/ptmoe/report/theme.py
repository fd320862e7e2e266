"""How figures look: the colours of both modes, and each label's colour and marker."""

from __future__ import annotations

from collections.abc import Mapping
from colorsys import hls_to_rgb
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ptmoe.errors import PtmoeError
from ptmoe.methods import METHODS

try:
    import jinja2  # noqa: F401  the page needs it
    from matplotlib import rc_context
    from matplotlib.colors import to_hex, to_rgb
except ModuleNotFoundError:
    raise PtmoeError("a report needs jinja2 and matplotlib: pip install 'ptmoe[report]'") from None

FONT_SIZE = 9.0  # points
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "*")


@dataclass(frozen=True)
class Theme:
    """Colours of one mode.

    Attributes:
        surface: behind the figure.
        ink: text and axes.
        faint: grid lines.
        untouched: the base without an adapter.
        experts: colours of experts, in their order.
        low, high: ends of the colour scale of shares.
        negative: the end of the scale of cosines opposite `high`.
    """

    surface: str
    ink: str
    faint: str
    untouched: str
    experts: tuple[str, ...]
    low: str
    high: str
    negative: str

    @property
    def is_light(self) -> bool:
        return sum(to_rgb(self.surface)) > 1.5


# Blue, orange and bluish green first: they are told apart with any common colour blindness.
LIGHT = Theme(
    surface="#ffffff",
    ink="#1f2937",
    faint="#e5e7eb",
    untouched="#858b95",
    experts=("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a7f87", "#5340b8"),
    low="#f1f5f9",
    high="#0b5c94",
    negative="#b34700",
)
DARK = Theme(
    surface="#171b21",
    ink="#e5e7eb",
    faint="#323944",
    untouched="#9aa1ac",
    experts=("#4fa8e0", "#e6b23c", "#2fc79b", "#e092be", "#9fd4f5", "#f08a3c", "#9aa1ac", "#a79bf0"),
    low="#222933",
    high="#6db9ec",
    negative="#f08a3c",
)


def drawing(theme: Theme = LIGHT) -> AbstractContextManager[None]:
    """Within it, matplotlib draws in a theme, and the same figure gives the same bytes."""
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, theme.ink)
    style |= dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme.surface)
    style |= {"grid.color": theme.faint, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"font.size": FONT_SIZE, "lines.linewidth": 1.8, "legend.frameon": False, "legend.borderpad": 0.2}
    style |= dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), FONT_SIZE)
    return rc_context(style | {"svg.hashsalt": "ptmoe", "legend.handlelength": 1.8, "legend.columnspacing": 1.2})


class Style(NamedTuple):
    """How a label looks in every figure."""

    color: str
    marker: str


def styles(methods: Mapping[str, str], theme: Theme = LIGHT) -> dict[str, Style]:
    """Each label's colour and marker, from its method: the method's own (`figure_color`, `figure_marker`) where it has
    them, the others share the circle of hues; the sizes of one method go from light to dark."""
    own: dict[str, Any] = {method: getattr(METHODS.get(method), "figure_color", None) for method in methods.values()}
    hues = [method for method, color in own.items() if color is None and method in METHODS]
    found: dict[str, Style] = {}
    for label, method in methods.items():
        marker = getattr(METHODS.get(method), "figure_marker", None) or MARKERS[len(found) % len(MARKERS)]
        if method not in METHODS:
            color = theme.untouched
        elif own[method] is not None:
            color = own[method][0 if theme.is_light else 1]
        else:
            hue = 0.05 + hues.index(method) / len(hues)
            color = to_hex(hls_to_rgb(hue % 1, 0.34 if theme.is_light else 0.72, 0.55))
        alike = [other for other, of in methods.items() if of == method]
        if len(alike) > 1:
            # From a little towards the surface to far towards the ink: all of them stand out.
            turn = alike.index(label)
            share = -0.2 + 0.85 * turn / (len(alike) - 1)
            towards = to_rgb(theme.ink if share > 0 else theme.surface)
            mixed = np.average([to_rgb(color), towards], axis=0, weights=[1 - abs(share), abs(share)])
            color = to_hex((mixed[0], mixed[1], mixed[2]))
            marker = MARKERS[turn % len(MARKERS)]
        found[label] = Style(color, marker)
    return found
