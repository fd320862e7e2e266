"""A base's last hidden states, from which its logits are computed a part at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.fast.packing import TOLERANCE
from ptmoe.fast.trial import evaluating, standing_in

PROBED = 3  # tokens that a base is tried out on


class Hidden:
    """The hidden states of a base's decoder, and their logits as the base itself computes them.

    Within `at(…)` the base's forward is called: behind the decoder it sees one position only, and `states (S, H)` holds
    the states asked for. Afterwards `project` returns their logits.
    """

    states: Tensor

    def __init__(self, base: PreTrainedModel, decoder: nn.Module) -> None:
        self.base = base
        self.decoder = decoder

    @contextmanager
    def at(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        def keep(_: nn.Module, __: Any, output: Any) -> Any:
            self.states = output.last_hidden_state[rows, columns]
            self.output = type(output)
            output["last_hidden_state"] = output.last_hidden_state[:1, :1].detach()
            return output

        with self.decoder.register_forward_hook(keep):
            yield

    def project(self, states: Tensor) -> Tensor:
        """`(S, H)` to `(S, V)`: the base's own forward runs, with the states in place of its decoder's output."""
        with standing_in(self.decoder, forward=lambda *_, **__: self.output(last_hidden_state=states[None])):
            logits: Tensor = self.base(inputs_embeds=states[None], use_cache=False, return_dict=True).logits[0]
        return logits


def decoder_of(base: PreTrainedModel) -> nn.Module | None:
    """The outermost part of a base that gives last hidden states, all that its logits follow from; None without one.

    It is tried out: `get_decoder` may be the base itself, its head, or a part that needs more than embeddings.
    """
    found: list[nn.Module] = []

    def see(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            found.append(module)

    embedded = base.get_input_embeddings().weight
    ids = torch.arange(PROBED, device=embedded.device)[None] * (len(embedded) // PROBED)
    hooks = [module.register_forward_hook(see) for module in base.modules() if module is not base]
    try:
        with evaluating(base):
            whole = base(input_ids=ids, use_cache=False).logits[0].float()
            hidden = Hidden(base, found[-1])
            with hidden.at(torch.zeros_like(ids[0]), torch.arange(PROBED, device=ids.device)):
                base(input_ids=ids, use_cache=False)
            part = hidden.project(hidden.states).float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    same = part.shape == whole.shape and (part - whole).norm() <= TOLERANCE.get(base.dtype, 0.02) * whole.norm()
    return hidden.decoder if same else None
