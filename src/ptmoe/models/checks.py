"""One check when a base is wrapped: does it give from embeddings what it gives from token ids?

Two short rows go through the base's own path, and through ours without an adapter: alone, behind padding, before
padding, and two tokens of generation from embeddings. What `InputPath` can add to our path it adds; a base whose logits
differ all the same is refused before anything is trained on it. Checked once in a process for each architecture and
configuration, in half a dozen passes over a few tokens.
"""

import inspect
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptmoe.errors import PtmoeError
from ptmoe.fast.trial import evaluating
from ptmoe.methods.base import Prompt, quantization_of
from ptmoe.models.generation import GeneratingModel
from ptmoe.models.greedy import GREEDY
from ptmoe.models.input_path import probe_ids, reason
from ptmoe.models.wrapper import check_unchanged

LENGTHS = (5, 3)
NEW = 2  # tokens: one from embeddings, one from the cache
NAN = "its own logits are NaN"
TOLERANCE, HALF, OF_8_BITS = 1e-3, 0.05, 0.15  # relative, of float32 and float64, of other dtypes, of LLM.int8()

_checked: dict[str, bool] = {}  # `InputPath.left_padding` of bases that agree


def check_decoder(base: PreTrainedModel) -> None:
    """
    Raises:
        PtmoeError: what is no model of `transformers`, is of a class that is no causal language model or takes no
            embeddings, or holds an adapter, of another model or of `peft`.
    """
    name = type(base).__name__
    if isinstance(base, str | PathLike | tuple | list):
        what = repr(base) if isinstance(base, str) else f"a {name}"
        raise PtmoeError(f"{what} is not a model: give one alone, as in model, tokenizer = load_base('nano')")
    wrapping = "_orig_mod" if hasattr(base, "_orig_mod") else "module"  # of torch.compile; of DataParallel and its like
    if not hasattr(base, "config") or not hasattr(base, "get_input_embeddings") or wrapping == "_orig_mod":
        inner = getattr(base, wrapping, None)
        give = "give a causal language model, loaded by AutoModelForCausalLM"
        if inner is not None:
            give = f"give the {type(inner).__name__} in it (its .{wrapping}), and wrap what attach returns"
        raise PtmoeError(f"{name} is not a model of transformers: {give}")
    if base.config.is_encoder_decoder:
        raise PtmoeError(f"{name} is not a decoder that takes inputs_embeds: give a causal language model")
    if not base.can_generate() or base.get_output_embeddings() is None:
        raise PtmoeError(
            f"{name} is not a decoder that predicts the next token: give a causal language model, loaded by "
            "AutoModelForCausalLM"
        )
    check_unchanged(base)
    if not isinstance(getattr(base.get_input_embeddings(), "weight", None), Tensor):
        raise PtmoeError(f"{name} is not a decoder of text: its input embedding is not one matrix")
    if "inputs_embeds" not in inspect.signature(base.forward).parameters:
        raise PtmoeError(f"{name} is not a decoder that takes inputs_embeds: give a causal language model that does")
    if "peft" not in sys.modules:  # importing it takes seconds, and who has such a base has done so
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in base.modules()):
        raise PtmoeError(
            f"{name} holds an adapter of peft, which would not be saved with ours: merge it into the base first, with "
            "merge_and_unload of peft's model, or load the base again"
        )


def check_base(model: GeneratingModel) -> None:
    """Check a model that holds no adapter yet, and set `path.left_padding`.

    Raises:
        PtmoeError: its base gives other logits from embeddings than from token ids, or does not generate from them.
    """
    base = model.base_model
    if any(parameter.device.type == "meta" for parameter in base.parameters()):
        warnings.warn(
            f"parts of this {type(base).__name__} are offloaded, so whether it works from embeddings was not tried "
            "out: attach to a small model of its kind to find out",
            stacklevel=4,
        )
        return
    about = (type(base), base.dtype, model.device.type, quantization_of(base), base.config._attn_implementation)
    key = repr((*about, base.config.to_dict()))
    with model.lock, evaluating(base):
        obstacle = _obstacle(model) if key not in _checked else _broken_weights(model)
    if obstacle is not None:
        raise PtmoeError(f"{type(base).__name__} cannot be used behind a prompt: {obstacle}")
    model.path.left_padding = _checked.setdefault(key, model.path.left_padding)


def check_adapter(model: GeneratingModel, name: str, before: str) -> None:
    """Try an adapter that is not virtual tokens alone on its base; one that does not fit, or whose trial is
    interrupted, is taken out again, and the one `before` it is active again.

    Raises:
        PtmoeError: the base does not run with it, or nothing that it changes is on the way of text.
    """
    config, base = model.adapters[name].config, model.base_model
    layers = config.changes_layers or config.changes_rows
    if not (config.fills_cache or layers) or any(p.device.type == "meta" for p in base.parameters()):
        return
    obstacle = None
    try:
        with model.lock, evaluating(model), torch.enable_grad(), model.adapters[name].register_forward_hook(_detached):
            rows = list(probe_ids(base, sum(LENGTHS))[0].split(LENGTHS))
            one, other = (model(input_ids=row[None], adapter_names=[name]).logits[0] for row in rows)
            if layers and not one.requires_grad:
                obstacle = "none of the modules that it changes computes text: name others in target_modules"
            if config.fills_cache and max(_off(model, rows, [one, other, other], [name] * 3)):
                obstacle = "the base counts padding as positions, so a row would depend on its batch; use pt or pt-moe"
    except Exception as error:  # whatever a forward raises
        obstacle = f"the base does not run with it ({reason(error)})"
    except BaseException:  # an interrupt
        with suppress(PtmoeError):  # `ft`, which cannot be taken out
            _take_out(model, name, before)
        raise
    if obstacle is not None:
        _take_out(model, name, before)
        raise PtmoeError(f"{config.method} does not fit {type(base).__name__}: {obstacle}")


def _take_out(model: GeneratingModel, name: str, before: str) -> None:
    # A method that changes the layers is alone, and may be taken out while it is active.
    if not model.adapters[name].config.changes_layers:
        model.adapters.active = ""
    model.delete_adapter(name)
    if before:
        model.set_adapter(before)


def _detached(encoder: nn.Module, arguments: Any, prompt: Prompt) -> Prompt:
    """A prompt whose virtual tokens leave no gradient, which is then that of what changes the layers."""
    changes = prompt.changes
    if changes is not None:  # also those of an adapter that is not active, whose tensors do not train
        numbers = {of: one.detach().requires_grad_() for of, one in changes.numbers.items()}
        changes = replace(changes, numbers=numbers)
    return replace(prompt, embeds=prompt.embeds.detach(), changes=changes)


def _obstacle(model: GeneratingModel) -> str | None:
    """Why the base cannot be used; None where it can."""
    base = model.base_model
    ids = probe_ids(base, sum(LENGTHS))[0]
    rows = list(ids.split(LENGTHS))
    try:
        *own, whole = (_own_logits(base, row) for row in (*rows, ids))
    except Exception as error:  # whatever a forward raises
        return f"it does not run on token ids alone ({reason(error)})"
    if any(logits.dim() != 2 or len(logits) != len(row) for logits, row in zip(own, rows, strict=True)):
        return "it gives no logits for each token"
    if whole.isnan().any():
        return NAN
    if _off_by(base, own[0], whole[: LENGTHS[0]]):
        return "it is not causal: logits change with later tokens (a BERT-like model needs is_decoder=True)"
    expected = [own[0], own[1], own[1]]
    try:
        alone, behind, before = _off(model, rows, expected)
        if behind and not alone:
            model.path.left_padding = False
            alone, behind, before = _off(model, rows, expected)
    except Exception as error:  # whatever a forward raises
        return f"it does not run on embeddings ({reason(error)})"
    for place, off in (("", alone), (" behind padding", behind), (" before padding", before)):
        if off:
            return f"from embeddings{place} its logits are off by {off:.1%} from those of the same token ids"
    obstacle = _generation_obstacle(model, rows)
    if obstacle is not None and model.path.left_padding:
        model.path.left_padding = False
        obstacle = _generation_obstacle(model, rows)
    return obstacle or _rotation_obstacle(model, rows[0])


def _broken_weights(model: GeneratingModel) -> str | None:
    """What other weights of a configuration that was checked may have: one pass says."""
    (ids,) = probe_ids(model.base_model, LENGTHS[0])
    return NAN if _own_logits(model.base_model, ids).isnan().any() else None


def _rotation_obstacle(model: GeneratingModel, row: Tensor) -> str | None:
    """Why rows cannot share a batch: what a row's first tokens are depends on how far off the last one is, otherwise
    than `path.switches` says.

    A base rotates by the highest position that it is given, so a few tokens, of which the last is far off, tell.
    """
    base, limit, short = model.base_model, model.max_positions, len(row)
    rotary = any(name.endswith("inv_freq") for name, _ in base.named_buffers())  # others have a table of positions
    if not rotary or not model.takes_positions or limit is None or limit <= short:
        return None
    bounds = [short - 1, *(switch for switch in model.path.switches if short <= switch < limit), limit]
    for before, longest in pairwise(bounds):
        try:
            near, far = (_at_positions(model, row, last) for last in (before, longest - 1))
        except (IndexError, RuntimeError):  # positions are places in its cache as well (MiniMax M3's sparse attention)
            return None
        if _off_by(base, near, far):
            return (
                f"its first tokens' logits depend on a row's length between {before + 1} and {longest} positions, so "
                "on the longest row of a batch, otherwise than its config's rope_type says"
            )
    return None


def _at_positions(model: GeneratingModel, row: Tensor, last: int) -> Tensor:
    """`(L - 1, V)`: the logits of all tokens but the last, which is at position `last`."""
    positions = torch.arange(len(row), device=row.device)
    positions[-1] = last
    given = {"position_ids": positions[None] + model.path.first_position, "attention_mask": torch.ones_like(row)[None]}
    logits: Tensor = model.base_model(input_ids=row[None], use_cache=False, **given).logits[0, :-1]
    return logits


def _off(
    model: GeneratingModel, rows: list[Tensor], expected: list[Tensor], names: list[str] | None = None
) -> list[float]:
    """How far our logits are off, alone, behind and before padding."""
    longest, padding = rows[0], rows[0][: LENGTHS[0] - LENGTHS[1]]
    ids = torch.stack([longest, torch.cat([padding, rows[1]]), torch.cat([rows[1], padding])])
    mask = torch.ones_like(ids)
    mask[1, : len(padding)] = mask[2, len(rows[1]) :] = 0
    logits = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    return [
        _off_by(model.base_model, wanted, given[real])
        for wanted, given, real in zip(expected, logits, mask.bool(), strict=True)
    ]


def _generation_obstacle(model: GeneratingModel, rows: list[Tensor]) -> str | None:
    batch = rows if model.path.left_padding else rows[:1]
    padded = [torch.cat([rows[0][: LENGTHS[0] - len(row)], row]) for row in batch]
    mask = torch.stack([torch.arange(LENGTHS[0], device=row.device) >= LENGTHS[0] - len(row) for row in batch]).long()
    asked: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    try:
        made = model.generate(
            torch.stack(padded), mask, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **asked, **GREEDY
        )
    except Exception as error:  # whatever `generate` raises
        return f"it does not generate from embeddings ({reason(error)})"
    given = torch.stack(made.logits, 1)  # (B, NEW, V)
    for index, row in enumerate(batch):
        whole = torch.cat([row, made.sequences[index, LENGTHS[0] :]])
        wanted = _own_logits(model.base_model, whole)[len(row) - 1 :]
        if off := _off_by(model.base_model, wanted[: given.shape[1]], given[index]):
            return f"generating from embeddings, its logits are off by {off:.1%} from those of the same token ids"
    return None


def _own_logits(base: PreTrainedModel, row: Tensor) -> Tensor:
    """`(L, V)`, of the token ids `(L,)` without a cache."""
    ids = row[None]
    logits: Tensor = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits


def _off_by(base: PreTrainedModel, expected: Tensor, given: Tensor) -> float:
    """How far logits `(S, V)` are off, relative to how much they differ between tokens; 0 within the tolerance.

    In half precision a mixture of experts may send a single token elsewhere, so there the median of the tokens counts.
    """
    wanted, found = expected.detach().float(), given.detach().float()
    masked = wanted.abs() > 1e30  # tokens that the base never predicts
    wanted, found = wanted.masked_fill(masked, 0), found.masked_fill(masked, 0)
    wanted, found = wanted - wanted.mean(1, keepdim=True), found - found.mean(1, keepdim=True)
    relative = (found - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-6)
    exact = base.dtype in (torch.float32, torch.float64) and quantization_of(base) is None
    error = float(relative.max() if exact else relative.median())
    tolerance = TOLERANCE if exact else OF_8_BITS if quantization_of(base) == "8bit" else HALF
    return 0.0 if error <= tolerance else error or 1.0
