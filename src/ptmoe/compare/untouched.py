"""The base as it is, a row beside the methods. It trains nothing, so it is not in `ptmoe.methods.METHODS`."""

from __future__ import annotations

from typing import ClassVar

from ptmoe.methods.base import MethodConfig
from ptmoe.train.options import BASE


class UntouchedConfig(MethodConfig):
    """No adapter."""

    method: ClassVar[str] = BASE
    order: ClassVar[int] = 0
    figure_color: ClassVar[tuple[str, str] | None] = ("#858b95", "#9aa1ac")
    num_virtual_tokens: ClassVar[int] = 0
