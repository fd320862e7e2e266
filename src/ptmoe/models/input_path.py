"""How a base takes what we give it in place of token ids: measured on the base, not listed by class.

    its own path    token ids -> embedding [· multiplier] [+ position 2, 3, ...] [and an input for each layer] -> layers
    ours            embeddings ------------------------------------------------------------------------------> layers

Falcon-H1 multiplies what it has looked up, and nothing else; RoBERTa counts positions from behind its padding index;
Gemma 3n and Gemma 4 look up an input for each layer as well. `measure` runs both ways up to the first layer and
compares what arrives there, so it costs next to nothing on a base of any size. Whether the logits then agree is for
`ptmoe.models.checks`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.errors import PtmoeError
from ptmoe.fast.trial import evaluating, standing_in
from ptmoe.models.rotation import switches

PROBED = 5  # tokens
PER_LAYER = "per_layer_inputs"
SPLICED = ("position_ids", "inputs_embeds", "past_key_values", PER_LAYER)


@dataclass
class InputPath:
    """What a path from embeddings has to add to be the base's own."""

    scale: float = 1.0  # of the embeddings
    first_position: int = 0  # the position id of a row's first token
    per_layer: Callable[[Tensor], Tensor] | None = None  # of ids `(B, S)`, the layers' inputs `(B, S, layers, D)`
    placeholder: int = 0  # the token id that stands for a virtual token there, as it does for an image's
    left_padding: bool = True  # a row is the same behind padding; else it is brought to the front, and generates alone
    chosen: int | None = None  # positions that sparse attention chooses; None where it attends to all, or to a window
    switches: tuple[int, ...] = ()  # lengths above which all positions are rotated otherwise (`ptmoe.models.rotation`)

    def straddled(self, shortest: int, longest: int) -> bool:
        """Whether rows from `shortest` to `longest` positions are on both sides of a switch."""
        return any(shortest <= switch < longest for switch in self.switches)


def checked_options(base: nn.Module, input_ids: Tensor, options: dict[str, Any], asked: str) -> dict[str, Any]:
    """The options of a call of `asked`, `"forward"` or `"generate"`, that may go to the base.

    Raises:
        PtmoeError: one that the splice decides, or that has something for each token of the input.
    """
    for name in SPLICED:
        if options.get(name) is not None:
            raise PtmoeError(
                f"{asked} takes no {name}: the prompt is spliced in here, and positions count each row's real tokens; "
                "leave it out, mark padding in attention_mask, and decode by generate()"
            )
    if options.get("cu_seq_lens_q") is not None:
        raise PtmoeError(
            "cu_seq_lens_q parts a row into texts, which would share one prompt: give each a row of its own"
        )
    for name, value in options.items():
        of_tokens = isinstance(value, Tensor) and value.shape[:2] == input_ids.shape
        if of_tokens and name in inspect.signature(base.forward).parameters:
            raise PtmoeError(
                f"{asked} takes no {name}: it has a value for each token of the input and none for the prompt's, and "
                "does not follow where padding is moved or left out; leave it out"
            )
    return {name: value for name, value in options.items() if name not in SPLICED}


class ScaledEmbedding(nn.Module):
    """An embedding, `(B, L)` ids to `(B, L, H)`, times a number. It does not own the weights."""

    embedding: nn.Embedding

    def __init__(self, embedding: nn.Module, scale: float) -> None:
        super().__init__()
        vars(self)["embedding"] = embedding
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def num_embeddings(self) -> int:
        return self.embedding.num_embeddings

    def forward(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.embedding(input_ids)) * self.scale


def probe_ids(base: PreTrainedModel, count: int = PROBED) -> Tensor:
    """`(1, count)` ids of ordinary tokens, spread over the vocabulary."""
    special = set(_special_ids(base.config.to_dict()))
    vocabulary = min(len(base.get_input_embeddings().weight), base.config.get_text_config().vocab_size)
    ordinary = [token for token in range(vocabulary) if token not in special][: max(4096, count)]
    if not ordinary:
        raise PtmoeError(f"{type(base).__name__} has no ordinary tokens to try it out on: pass check=False")
    step = max(1, len(ordinary) // count)
    chosen = [ordinary[index * step % len(ordinary)] for index in range(count)]
    return torch.tensor([chosen], device=base.get_input_embeddings().weight.device)


def _special_ids(config: dict[str, Any]) -> Iterator[int]:
    """The ids of tokens that mean something else to the base: padding, an image, …"""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _special_ids(value)
        elif str(name).endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


def measure(base: PreTrainedModel) -> InputPath:
    """What the base's own path adds.

    Raises:
        PtmoeError: it does not run on token ids alone.
    """
    path = InputPath()
    config, embedding = base.config.get_text_config(), base.get_input_embeddings()
    parameters = inspect.signature(base.forward).parameters
    if getattr(config, "hidden_size_per_layer_input", None):
        owners = (module for module in base.modules() if hasattr(module, "get_per_layer_inputs"))
        path.per_layer = getattr(next(owners, None), "get_per_layer_inputs", None)
        path.placeholder = config.pad_token_id or 0
    # Some choose padding, too, but in rows too long to be tried out.
    path.chosen = getattr(config, "index_topk", None) or getattr(config, "indexer_budget", None)
    in_blocks = "minimax_m3_sparse" in (getattr(config, "layer_types", None) or ())  # counted from the batch's start
    path.left_padding = path.chosen is None and not in_blocks
    path.switches = switches(base)
    with evaluating(base):
        ids = probe_ids(base)
        embeds = embedding(ids)
        own = _arriving(base, ids, input_ids=ids)
        given = {"inputs_embeds": embeds, **({} if path.per_layer is None else {PER_LAYER: path.per_layer(ids)})}
        if "position_ids" in parameters:
            given["position_ids"] = torch.arange(PROBED, device=ids.device)[None]
        ours = _arriving(base, ids, **given)
    for name, value in own.items():
        other = ours.get(name)
        if other is None or other.shape != value.shape:
            continue
        difference = value - other
        if value.is_floating_point():
            if path.scale == 1.0 and difference.norm() > 0.05 * other.norm():
                path.scale = _scale(difference, embeds, config)
        elif bool((difference == difference[0, 0]).all()) and difference[0, 0]:
            path.first_position = int(difference[0, 0])
    return path


@contextmanager
def taking_embeddings(base: PreTrainedModel, per_layer: Tensor | None) -> Iterator[None]:
    """Within it the base's `generate` takes `inputs_embeds`, in its first step with `per_layer` `(B, S, layers, D)`.

    `transformers` refuses embeddings where the name is not in the signature of `prepare_inputs_for_generation`; many
    that lack it hand them on all the same (Gemma 3 with vision, Bamba), as `ptmoe.models.checks` finds out.
    """
    own = base.prepare_inputs_for_generation
    if per_layer is None and "inputs_embeds" in inspect.signature(own).parameters:
        yield
        return

    # `generate` looks for this name of the rest: it then allows what the base's forward takes.
    def prepare(input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        if not kwargs.get("is_first_iteration"):
            return cast(dict[str, Any], own(input_ids, **kwargs))
        prepared: dict[str, Any] = own(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if per_layer is not None:  # as many copies of each row as there are beams
            prepared[PER_LAYER] = per_layer.repeat_interleave(len(input_ids) // len(per_layer), 0)
        return prepared

    with standing_in(base, prepare_inputs_for_generation=prepare):
        yield


class _Arrived(Exception):  # noqa: N818
    """The first layer is reached."""


def _arriving(base: nn.Module, ids: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
    """What the modules before the first layer, and the layer, are called with: the first tensor of `(1, L, H)` of each,
    and the first of whole numbers `(1, L)` that are not the ids."""
    seen: dict[str, Tensor] = {}
    layers = {module for child in base.modules() if isinstance(child, nn.ModuleList) for module in child}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, arguments: Any, options: Any) -> None:
            for value in (*arguments, *options.values()):
                if not isinstance(value, Tensor) or value.shape[:2] != ids.shape:
                    continue
                if value.is_floating_point() and value.dim() == 3:
                    seen.setdefault(f"{name} states", value.detach().float().clone())
                    if module in layers:
                        raise _Arrived
                elif not value.is_floating_point() and value.dim() == 2 and not torch.equal(value, ids):
                    seen.setdefault(f"{name} numbers", value.long().clone())

        return see

    hooks = [
        module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in base.named_modules() if name
    ]
    try:
        base(**inputs, use_cache=False)
    except _Arrived:
        pass
    except Exception as error:  # whatever a forward raises
        raise PtmoeError(
            f"{type(base).__name__} cannot be used behind a prompt: it does not run on {next(iter(inputs))} alone "
            f"({reason(error)})"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _scale(difference: Tensor, embeds: Tensor, config: Any) -> float:
    """The factor between the two paths, 1 where they differ in another way.

    In half precision it is read off inexactly, so a number of the config that is as near as that is taken for it.
    """
    flat = embeds.float()
    if difference.shape != flat.shape:
        return 1.0
    factor = 1 + float((difference * flat).sum() / flat.square().sum())
    if (difference - (factor - 1) * flat).norm() > 0.02 * difference.norm():
        return 1.0
    numbers = [value for value in config.to_dict().values() if isinstance(value, float)]
    nearest = min([*numbers, flat.shape[2] ** 0.5], key=lambda number: abs(number - factor))
    return nearest if abs(nearest - factor) < 5e-3 * abs(factor) else factor


def reason(error: Exception) -> str:
    """An error of another library in one line."""
    return f"{' '.join(str(error).split()):.160}" or type(error).__name__
