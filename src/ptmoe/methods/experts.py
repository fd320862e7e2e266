"""Experts with a part in common: each is trained as `A_i = S + D_i`, whose `S` learns from every input."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptmoe.methods.routing import RoutedEncoder


class Experts(RoutedEncoder):
    """Experts `A (N, …)` behind a router. While `S (…)` is there, `A` holds their differences from it; when training
    ends it is folded into `A`, which is the published form.

    A subclass creates the tensors of `shared_parts` in its constructor, those in common as None, and calls `share` when
    it is initialised.

    Attributes:
        shared_parts: the name of each tensor of the experts, and that of what they have in common.
    """

    shared_parts: ClassVar[dict[str, str]] = {"A": "S"}

    def share(self) -> None:
        """Train the experts with a part in common, which starts at zero."""
        for name, shared in self.shared_parts.items():
            parameter = nn.Parameter(torch.zeros_like(getattr(self, name)[0]))
            parameter.passing = True  # type: ignore[attr-defined]
            setattr(self, shared, parameter)

    def whole(self, name: str) -> Tensor:
        """The experts' tensor of this name, `(N, …)`, in the published form."""
        own: Tensor = getattr(self, name)
        shared: Tensor | None = getattr(self, self.shared_parts[name])
        if shared is None:
            return own
        # An expert that trains alone has nobody to share with: both parts would move, at twice the pace of one. The
        # gradient of 0 keeps the parameter in use, as distributed training wants it.
        return own + (shared.detach() + 0 * shared if self.alone else shared)

    def tensors(self) -> dict[str, Tensor]:
        published = super().tensors() | {name: self.whole(name).detach() for name in self.shared_parts}
        return {name: value for name, value in published.items() if name not in self.shared_parts.values()}

    @torch.no_grad()
    def finish_training(self) -> None:
        super().finish_training()
        for name, shared in self.shared_parts.items():
            getattr(self, name).copy_(self.whole(name))
            setattr(self, shared, None)

    def training_state(self) -> dict[str, Tensor]:
        parts = [(name, getattr(self, name)) for pair in self.shared_parts.items() for name in pair]
        sharing = all(value is not None for _, value in parts)
        return super().training_state() | ({name: value.detach() for name, value in parts} if sharing else {})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        for name, shared in self.shared_parts.items():
            own, common, here = prefix + name, prefix + shared, getattr(self, shared)
            if here is None and common in state_dict:  # of a training that has ended here and is resumed
                state_dict[own] = state_dict[own] + state_dict.pop(common)
            if here is not None and own in state_dict:  # of a training that had ended when it was saved
                state_dict.setdefault(common, torch.zeros_like(here))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        shared = [getattr(self, name) for name in self.shared_parts.values()]
        common = zip(self.shared_parts.values(), shared, strict=True)
        super().load_tensors(tensors | {name: torch.zeros_like(one) for name, one in common if one is not None})
