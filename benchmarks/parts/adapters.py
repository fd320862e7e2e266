"""How much memory one adapter more takes, on a base that holds many."""

from __future__ import annotations

import gc
import tempfile
import time
from typing import Any

from benchmarks.machine import Setting, memory
from benchmarks.worker import Round
from ptmoe.models.attach import attach, load_adapter
from ptmoe.train.options import method_config


def loaded(setting: Setting, method: dict[str, Any], counts: list[int]) -> Round:
    """The memory at each of `counts` adapters, loaded from a folder under names of their own."""
    base = setting.base()

    def measure(_: bool) -> dict[str, Any]:
        model = attach(base, method_config(method))
        parameters = sum(each.numel() * each.element_size() for each in model.encoder.parameters())
        points = []
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            started = time.perf_counter()
            for count in counts:
                for number in range(len(model.encoders), count):
                    load_adapter(model, folder, name=f"adapter {number}")
                gc.collect()
                points.append({"adapters": count, "bytes": memory(), "loading_seconds": time.perf_counter() - started})
        grown = (points[-1]["bytes"] - points[-2]["bytes"]) / (counts[-1] - counts[-2])
        return {"points": points, "parameter_bytes": parameters, "adapter_over_parameters": grown / parameters}

    return measure
