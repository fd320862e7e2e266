"""FT, full fine-tuning: every weight of the base trains, tied ones once.

W ← W - η ∇W                       every weight W of the base

The base itself is trained, in float32 whatever its dtype: the adapter folder holds a whole model's weights, and neither
`disable_adapter` nor `delete_adapter` can restore the untouched base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ptmoe.errors import PtmoeError
from ptmoe.methods.base import QUANTIZATIONS, Batches, PreTrainedModel, quantization_of
from ptmoe.methods.weights import SharedParameters, WeightConfig, WeightEncoder


class FTConfig(WeightConfig):
    """Full fine-tuning: as many trainable parameters as the base has. `adapter_model.safetensors` holds all of them,
    under the base's own keys."""

    method = "ft"
    order = 90
    figure_color = ("#1f2937", "#f3f4f6")
    figure_marker = "p"
    default_learning_rate = 1e-4
    trains_base = True
    unsupported_quantizations = QUANTIZATIONS

    def encoder_for(self, base: PreTrainedModel, batches: Batches | None = None) -> FT:
        self.check_quantization(quantization_of(base))
        return FT(self, base)


class FT(WeightEncoder):
    def __init__(self, config: FTConfig, base: PreTrainedModel) -> None:
        super().__init__(config, base)
        self.check_in_memory(base.parameters())
        # An update is smaller than the resolution of bfloat16: rounding would drop it.
        self.weights = SharedParameters(dict(base.float().named_parameters()))

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.weights.state_dict())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        raise PtmoeError("ft has changed the base's own weights, it cannot be switched off: load the base again")
        yield

    def remove(self) -> None:
        raise PtmoeError("ft has changed the base's own weights, it cannot be deleted: load the base again")
