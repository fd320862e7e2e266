"""The base as it is, a row beside the methods: it trains nothing, so it is none of `ptmoe.methods.METHODS`."""

from __future__ import annotations

from typing import ClassVar

from ptmoe.methods.base import MethodConfig
from ptmoe.train.options import BASE


class UntouchedConfig(MethodConfig):
    """No adapter."""

    method: ClassVar[str] = BASE
    num_virtual_tokens: ClassVar[int] = 0
