"""Greedy decoding: one pass over the inputs, then a token at a time; rows that have ended leave the batch.

    [padding | prompt | tokens]                      one pass; only the last position is scored
    [prompt | padding | tokens]                      a fixed prompt: its keys and values are computed once and kept
    [a token of each unfinished row]                 then, until there is none

A base that caches more than keys and values, prepares its inputs itself or asks for changed scores is decoded by
`transformers` (`stepping_obstacle` says why): the same tokens, slower.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer

from ptmoe.fast.passes import CHANGES
from ptmoe.fast.paths import fast_kernels
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.greedy import GREEDY, last_logits, narrowest_window, stepping_obstacle


class Decoder:
    """Decodes greedily with a model in evaluation mode and its active adapter. While it is in use, neither the adapter
    nor the base may change."""

    @torch.no_grad()
    def __init__(self, model: PromptedCausalLM) -> None:
        model.check_unchanged()
        self.model = model
        self.base = model.base_model
        self.options = {"use_cache": True, **last_logits(self.base)}
        obstacle = stepping_obstacle(self.base, model.path)
        self.steps = obstacle is None
        if obstacle is not None:
            warnings.warn(
                f"{type(self.base).__name__} is decoded by transformers, which is slower: {obstacle}", stacklevel=2
            )
        self.takes_positions = model.takes_positions
        self.prefix: list[tuple[Tensor, Tensor]] | None = None  # each layer's keys and values, (N, heads, T, d)
        self.shapes: list[tuple[Tensor, Tensor]] = []  # likewise of any input, for the shapes and dtypes of a cache
        if not self.steps:
            return
        prompts = model.fixed_prompts()
        # With padding between prompt and tokens only explicit positions tell where a token is.
        with model.lock:
            if prompts is not None and self.takes_positions and not model.path.switches:
                self.shapes = self.prefix = self._read(prompts)
            else:
                token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
                self.shapes = self._read(model.adapters.embedding(token))

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[list[int]],
        experts: Sequence[int],
        *,
        max_new_tokens: int,
        ended: Callable[[list[int]], bool],
        margin: float = 0.0,
    ) -> list[list[int]]:
        """Each row's new tokens.

        Args:
            prompts: token ids, at least one each.
            experts: which of the adapter's fixed prompts each row has.
            max_new_tokens: of each row.
            ended: whether a row that has these new tokens has ended with the last of them.
            margin: where the best score is less than this above the next, the row alone decides.

        Raises:
            PtmoeError: a row too long for the base's positions.
        """
        positions = [self.model.num_virtual_tokens + len(prompt) for prompt in prompts]
        apart = self.model.path.straddled(min(positions), max(positions) + max_new_tokens - 1)
        if apart and len(prompts) > 1:  # a row must not be rotated by another's length
            return [
                self([row], [expert], max_new_tokens=max_new_tokens, ended=ended)[0]
                for row, expert in zip(prompts, experts, strict=True)
            ]
        with self.model.lock, fast_kernels(self.base):
            if self.steps and not apart:  # else `generate` reads again what the switch rotates otherwise
                return self._decode(prompts, experts, max_new_tokens, ended, margin)
            return self._generate(prompts, max_new_tokens, ended, margin if len(prompts) > 1 else 0.0)

    def _decode(
        self,
        prompts: Sequence[list[int]],
        experts: Sequence[int],
        max_new_tokens: int,
        ended: Callable[[list[int]], bool],
        margin: float,
    ) -> list[list[int]]:
        inputs = self._first_inputs(*padded(prompts, self.model.device), experts, max_new_tokens)
        cache, positions, changes = inputs["past_key_values"], inputs.get("position_ids"), inputs.get(CHANGES)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, max_new_tokens), value=1)
        generated: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for remaining in reversed(range(max_new_tokens)):
            tokens, margins = _best(self.base(**inputs, **self.options).logits[:, -1], margin)
            unfinished = []
            for index, (row, lead) in enumerate(zip(running, margins, strict=True)):
                if not lead >= margin:  # also where it is NaN
                    tokens[index] = self._alone(prompts[row], generated[row])
            for index, (row, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
                generated[row].append(token)
                if not ended(generated[row]):
                    unfinished.append(index)
            if not unfinished or not remaining:
                break
            positions = None if positions is None else positions[:, -1:] + 1
            if len(unfinished) < len(running):
                running = [running[index] for index in unfinished]
                kept = torch.tensor(unfinished, device=tokens.device)
                cache.batch_select_indices(kept)
                tokens, mask = tokens[kept], mask[kept]
                positions = None if positions is None else positions[kept]
                changes = None if changes is None else changes[kept]
            inputs = {
                "input_ids": tokens[:, None],
                "attention_mask": mask[:, : mask.shape[1] - remaining],
                "past_key_values": cache,
            }
            if positions is not None:
                inputs["position_ids"] = positions
            if changes is not None:
                inputs[CHANGES] = changes
        return generated

    def _alone(self, prompt: list[int], generated: list[int]) -> int:
        """The next token of a row decoded by itself: the same whatever batch it is in."""
        ids, mask = padded([prompt + generated], self.model.device)
        readable = torch.arange(ids.shape[1], device=ids.device)[None] < len(prompt)
        inputs = self.model.decoder_inputs(ids, mask, 1, readable)
        return int(self.base(**inputs, **self.options).logits[0, -1].argmax())

    def _first_inputs(self, ids: Tensor, mask: Tensor, experts: Sequence[int], new: int) -> dict[str, Any]:
        """The arguments of the first pass, with a cache that has room for `new` tokens and holds a fixed prompt."""
        limits = self.model.max_positions, narrowest_window(self.base)
        virtual = self.model.num_virtual_tokens
        needed = virtual + ids.shape[1] + new
        # A window counts the padding behind the prompt as well.
        if self.prefix is not None and all(limit is None or needed <= limit for limit in limits):
            chosen = torch.tensor(experts, device=ids.device)
            before = [(keys[chosen], values[chosen]) for keys, values in self.prefix]
            inputs = {
                "inputs_embeds": self.model.adapters.embedding(ids),
                "attention_mask": torch.cat([mask.new_ones(len(mask), virtual), mask], 1),
                "position_ids": virtual + (mask.cumsum(1) - 1).clamp(min=0),
            }
        else:
            inputs = self.model.decoder_inputs(ids, mask, new)
            held = inputs.get("past_key_values")
            before = [] if held is None else [(layer.keys, layer.values) for layer in held.layers]
        room = inputs["attention_mask"].shape[1] + new
        cache = DynamicCache(config=self.base.config)
        # All of them before anything else is computed: allocated later, they would fragment the memory.
        cache.layers = [
            layer if layer.is_sliding else PreallocatedLayer(shapes, len(ids), room)
            for layer, shapes in zip(cache.layers, self.shapes, strict=True)
        ]
        for index, (keys, values) in enumerate(before):
            cache.update(keys, values, index)
        return {**inputs, "past_key_values": cache}

    def _read(self, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values `(N, heads, T, d)` of prompts `(N, T, H)`."""
        cache = DynamicCache(config=self.base.config)
        mask = torch.ones(prompts.shape[:2], dtype=torch.long, device=prompts.device)
        inputs = {"inputs_embeds": prompts.to(self.model.dtype), "attention_mask": mask, "past_key_values": cache}
        if self.takes_positions:
            inputs["position_ids"] = mask.cumsum(1) - 1
        self.base(**inputs, **self.options)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _generate(
        self, prompts: Sequence[list[int]], new: int, ended: Callable[[list[int]], bool], margin: float
    ) -> list[list[int]]:
        if len(prompts) > 1 and not self.model.path.left_padding:
            return [self._generate([prompt], new, ended, 0.0)[0] for prompt in prompts]
        ids, mask = padded(prompts, self.model.device)
        watch = _Watch(ids, ended, margin)
        made = self.model.generate(
            ids,
            mask,
            max_new_tokens=new,
            pad_token_id=0,
            logits_processor=[watch.see],
            stopping_criteria=[watch],
            **GREEDY,
        )
        return [
            tokens[:length] if sure else self._generate([prompt], new, ended, 0.0)[0]
            for prompt, tokens, length, sure in zip(
                prompts, made[:, ids.shape[1] :].tolist(), watch.lengths, watch.sure, strict=True
            )
        ]


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `(B, L)`, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _best(scores: Tensor, margin: float) -> tuple[Tensor, list[float]]:
    """The best tokens `(B,)` for scores `(B, V)`, and the lead of each over the next, if a margin is asked for."""
    if not margin:
        return scores.argmax(1), [0.0] * len(scores)
    best, tokens = scores.topk(2, 1)  # of equal scores either may come first: their margin is 0
    return tokens[:, 0], (best[:, 0] - best[:, 1]).tolist()


class PreallocatedLayer(DynamicLayer):
    """One layer's cache with room for all that will come: new keys and values are written behind the others in buffers
    `(B, heads, room, d)`, where `DynamicLayer` copies them all."""

    def __init__(self, like: tuple[Tensor, Tensor], rows: int, room: int) -> None:
        super().__init__()
        self.buffers = [one.new_empty(rows, one.shape[1], room, one.shape[3]) for one in like]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        end = self.get_seq_length()
        self.buffers = [buffer[indices.to(buffer.device)] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)


class _Watch(StoppingCriteria):
    """Within `transformers`' `generate`: ends rows, and records their length and whether their tokens were certain."""

    def __init__(self, ids: Tensor, ended: Callable[[list[int]], bool], margin: float) -> None:
        self.start = ids.shape[1]
        self.ended = ended
        self.margin = margin
        self.margins = [0.0] * len(ids)
        self.lengths = [0] * len(ids)
        self.sure = [True] * len(ids)
        self.done = [False] * len(ids)

    def see(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that leaves them as they are."""
        self.margins = _best(scores, self.margin)[1]
        return scores

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for row, tokens in enumerate(input_ids[:, self.start :].tolist()):
            if not self.done[row]:
                self.lengths[row] = len(tokens)
                self.sure[row] = self.margins[row] >= self.margin
                self.done[row] = not self.sure[row] or self.ended(tokens)
        return torch.tensor(self.done, device=input_ids.device)
