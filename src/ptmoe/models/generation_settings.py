"""The settings of one call of `generate`: what is asked, else what the base has."""

from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import RepetitionPenaltyLogitsProcessor

from ptmoe.errors import PtmoeError

DEFAULT_NEW_TOKENS = 20  # of transformers, where neither the caller nor the base sets a length


@dataclass
class GenerationSettings:
    """The settings of one call."""

    options: dict[str, Any]  # of the call, a `generation_config` among them or not
    own: dict[str, Any]  # the base's

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The options and the config given, in the order in which `generate` looks there; the base's come last."""
        given = self.options.get("generation_config")
        return [self.options, *([] if given is None else [vars(given)])]

    def get(self, name: str, default: Any = None) -> Any:
        """The first value set."""
        found = (source[name] for source in (*self.asked, self.own) if source.get(name) is not None)
        return next(found, default)

    def real_tokens(self, input_ids: Tensor) -> Tensor:
        """The attention mask `(B, L)` where none is given: as in `transformers`, the padding token is taken for padding
        unless it ends texts as well."""
        padding, ends = self.get("pad_token_id"), torch.as_tensor(self.get("eos_token_id", [])).view(-1)
        if padding is None or padding in ends.tolist():
            return torch.ones_like(input_ids)
        return input_ids.ne(padding).long()

    def copies(self) -> int:
        """How many sequences `generate` makes of a row."""
        return max(int(self.get(name, 1)) for name in ("num_beams", "num_return_sequences"))

    def check_cache(self) -> None:
        """
        Raises:
            PtmoeError: a setting that leaves out the cache that the prompt stands in. That of a base whose own config
                does, as one that was trained with gradient checkpointing, gives way.
        """
        if any(source.get("use_cache") is False for source in self.asked):
            raise PtmoeError("use_cache=False leaves out the cache that the prompt stands in: leave it out")
        if self.get("cache_implementation") is not None:
            raise PtmoeError("cache_implementation makes another cache than the prompt stands in: leave it out")

    def with_new_tokens(self, length: int, room: int | None) -> tuple[dict[str, Any], int]:
        """The options with their lengths as numbers of new tokens, and the highest number of them.

        `transformers` would subtract the length of `inputs_embeds`, virtual tokens included, from a `max_length`; here
        it counts what the caller sees.

        Args:
            length: of the input, in tokens, padding included.
            room: the positions that the base has left, if it has a limit.

        Raises:
            PtmoeError: no new token.
        """
        most = _new_tokens("max", self.asked, length)
        if most is None:  # the base's default, or that of transformers, as far as the base's positions go
            most = _new_tokens("max", [self.own], length)
            most = DEFAULT_NEW_TOKENS if most is None else most
            most = most if room is None else min(most, max(room, 1))
        if most < 1:
            raise PtmoeError(f"{most} new tokens after an input of {length}: raise max_length or max_new_tokens")
        least = _new_tokens("min", [*self.asked, self.own], length)
        lengths = {"max_length": None, "min_length": None, "max_new_tokens": most}
        lengths["min_new_tokens"] = None if least is None else max(least, 0)
        rest = {name: value for name, value in self.options.items() if name not in lengths}
        if self.options.get("generation_config") is None:
            return rest | {name: value for name, value in lengths.items() if value is not None}, most
        rest["generation_config"] = copy(self.options["generation_config"])
        for name, value in lengths.items():
            setattr(rest["generation_config"], name, value)
        return rest, most


def _new_tokens(bound: str, sources: list[dict[str, Any]], length: int) -> int | None:
    """The `"max"` or `"min"` of new tokens after an input of `length`, from the first source that has one."""
    for source in sources:
        if source.get(f"{bound}_new_tokens") is not None:
            return cast(int, source[f"{bound}_new_tokens"])
        if source.get(f"{bound}_length") is not None:
            return cast(int, source[f"{bound}_length"]) - length
    return None


def of_real_tokens(penalty: float, attention_mask: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of `generate` with this repetition penalty on each row's real and new tokens, before other processors
    given. `attention_mask (B, L)` is that of the token ids.

    `transformers` leaves out as many tokens of each row as its mask has padding on the left. Ours is the mask of the
    prompt and the tokens, in which shorter prompts are padded as well and a cached one stands before the padding, while
    the token ids have no prompt, and padding on either side.
    """
    if penalty == 1:
        return options
    processor = RepetitionPenaltyLogitsProcessor(float(penalty))

    def penalised(input_ids: Tensor, scores: Tensor) -> Tensor:
        new = input_ids.shape[1] - attention_mask.shape[1]
        padding = nn.functional.pad(~attention_mask.bool(), (0, new))
        padding = padding.repeat_interleave(len(input_ids) // len(padding), 0)  # of each row's beams
        ids = input_ids.masked_fill(padding, scores.shape[1])  # no token's: it is left out
        return cast(Tensor, processor(ids, scores))

    others = options.get("logits_processor") or []
    return options | {"repetition_penalty": 1.0, "logits_processor": [penalised, *others]}
