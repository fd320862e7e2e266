"""The engine on `transformers` alone: rows that arrive together share a batch, whatever their adapters.

    a row arrives      one pass over its input, with the others that are waiting; then it joins the batch
    every step         one token of each row
    a row ends         it leaves

Greedy answers are those of `generate` for the row alone: in float32, where a batch rounds a near tie the other way, one
pass over the row alone decides, as in `ptmoe.evaluate.generation`.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ptmoe.errors import PtmoeError
from ptmoe.evaluate.generation import NEAR_TIE
from ptmoe.fast.passes import CHANGES, Changes
from ptmoe.fast.paths import fast_kernels
from ptmoe.models.causal import PromptedCausalLM
from ptmoe.models.greedy import last_logits, narrowest_window, stepping_obstacle
from ptmoe.serve.engine import LEAST, EngineError, Input, Sampling, Token, check_room
from ptmoe.serve.rows import Rows

GATHER = 0.003  # seconds that the first row of a batch waits for others
READ_AT_ONCE = 8192  # positions of one pass over inputs, padding included
KEPT = 256 * 2**20  # bytes of fixed prompts' keys and values
FAULTS = 2  # failed steps that a row may take part in

log = logging.getLogger(__name__)

States = list[tuple[Tensor, Tensor]]  # each layer's keys and values


@dataclass(eq=False)
class _Row:
    """A row on its way: `events` are its tokens, then None or an `EngineError`."""

    input: Input
    sampling: Sampling
    events: asyncio.Queue[Token | EngineError | None] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)
    faults: int = 0
    cancelled: bool = False
    done: bool = False


class LocalEngine:
    """A base model in this process, in evaluation mode and without a weight-side adapter.

    Attributes:
        near_ties: how many tokens a pass over the row alone has decided.
        on_step: called with the number of rows of each step.

    Raises:
        PtmoeError: a base that cannot be stepped token by token.
    """

    name = "local"

    def __init__(self, model: PromptedCausalLM, *, max_batch: int = 32) -> None:
        base = model.base_model
        obstacle = stepping_obstacle(base, model.path)
        if obstacle is not None or model.adapters.changes_layers:
            raise PtmoeError(
                f"the local engine cannot batch {type(base).__name__}: "
                f"{obstacle or 'its layers are changed by an adapter'}; use --engine with an inference engine for it"
            )
        self.model, self.base = model, base
        self.positions = model.max_positions
        self.switches = model.path.switches
        # What rotates by the longest row of a batch would rotate the others' keys as well.
        self.max_batch = 1 if self.switches else max_batch
        self.margin = NEAR_TIE if model.dtype == torch.float32 and self.max_batch > 1 else 0.0
        self.near_ties = 0
        self.on_step: Callable[[int], None] = lambda rows: None
        self._takes_positions = model.takes_positions
        self._options = {"use_cache": True, **last_logits(base)}
        self._window = narrowest_window(base)
        self._rows = Rows(base.config)
        self._running: list[_Row] = []
        self._waiting: queue.Queue[_Row | None] = queue.Queue()
        self._outbox: list[tuple[_Row, Token | EngineError | None]] = []
        self._prefixes: OrderedDict[Hashable, States] = OrderedDict()
        self._held: set[Any] = set()  # hooks on the base that rows have needed
        self._thread: threading.Thread | None = None

    # -- in the event loop -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="ptmoe-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        self._waiting.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def health(self) -> dict[str, Any]:
        alive = self._thread is not None and self._thread.is_alive()
        return {"ok": alive, "rows": len(self._running), "near_ties": self.near_ties}

    async def generate(self, row: Input, sampling: Sampling) -> AsyncGenerator[Token, None]:
        """As `Engine.generate`."""
        check_room(row, sampling.max_tokens, self.positions)
        mine = _Row(row, sampling)
        if sampling.seed is None:
            mine.generator.seed()
        else:
            mine.generator.manual_seed(sampling.seed)
        self._waiting.put(mine)
        try:
            while (event := await mine.events.get()) is not None:
                if isinstance(event, EngineError):
                    raise event
                yield event
        finally:
            mine.cancelled = True
            with self._waiting.mutex, suppress(ValueError):  # a full batch may not look at it for minutes
                self._waiting.queue.remove(mine)

    def _deliver(self, events: list[tuple[_Row, Token | EngineError | None]]) -> None:
        for row, event in events:
            row.events.put_nowait(event)

    # -- in the engine's thread --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        stopping = False
        while not (stopping and not self._running):
            arrived, stopping = self._arrivals(stopping)
            everyone = [*self._running, *arrived]
            try:
                with self.model.lock, fast_kernels(self.base):
                    for row in [row for row in self._running if row.cancelled]:
                        self._leave(row)
                    while arrived:
                        self._join(self._taken(arrived))
                    if self._running:
                        self._step()
            except Exception as error:  # of our own: the requests end, the server continues
                log.exception("the engine failed")
                for row in everyone:
                    self._end(row, _fault(error))
                self._running.clear()
                self._rows.clear()
            if self._outbox:
                events, self._outbox = self._outbox, []
                try:
                    self._loop.call_soon_threadsafe(self._deliver, events)
                except RuntimeError:  # the loop is closed, as when a server is told twice to stop
                    return

    def _arrivals(self, stopping: bool) -> tuple[list[_Row], bool]:
        """The rows that have come, as many as the batch has room for; waits where there is nothing else to do."""
        rows: list[_Row] = []
        waited = bool(self._running) or stopping
        while len(self._running) + len(rows) < self.max_batch:
            try:
                row = self._waiting.get(block=not waited and not rows)
            except queue.Empty:
                if waited:
                    break
                time.sleep(GATHER)
                waited = True
                continue
            if row is None:
                stopping = waited = True
            elif not row.cancelled:
                rows.append(row)
        return rows, stopping

    def _taken(self, arrived: list[_Row]) -> list[_Row]:
        """Take rows that one pass reads off the list: at least one, and all with a kept prompt or all without."""
        taken: list[_Row] = []
        longest, kept = 0, self._kept(arrived[0])
        for row in list(arrived):
            longest_yet = max(longest, len(row.input.embeds) + len(row.tokens))
            if taken and (self._kept(row) != kept or longest_yet * (len(taken) + 1) > READ_AT_ONCE):
                continue
            longest = longest_yet
            taken.append(row)
            arrived.remove(row)
        return taken

    def _join(self, rows: list[_Row]) -> None:
        """Read the rows' inputs and choose their first tokens."""
        try:
            layers, logits = self._read(rows, self._kept(rows[0]))
        except Exception as error:  # whatever the base raises: of several rows, find out which
            for row in rows if len(rows) > 1 else ():
                self._join([row])
            if len(rows) == 1:
                log.exception("an input could not be read")
                self._end(rows[0], _fault(error))
            return
        for row, states in zip(rows, layers, strict=True):
            self._rows.join(states)
            self._running.append(row)
        self._choose(rows, logits)

    def _step(self) -> None:
        first = self._running[0]  # alone, where the base has switches
        if self.switches and len(first.input.embeds) + len(first.tokens) - 1 in self.switches:
            self._join(self._taken_out())  # with this token all positions are rotated otherwise
            return
        tokens = torch.tensor([row.tokens[-1:] for row in self._running], device=self.model.device)
        inputs = self._rows.step(self.model.device) | self._changes(self._running)
        if not self._takes_positions:
            del inputs["position_ids"]
        try:
            logits = self.base(input_ids=tokens, **inputs, **self._options).logits[:, -1]
        except Exception as error:
            # Nobody knows which row it was, nor what is in the cache: each is read again, alone.
            log.exception("a step of %d rows failed", len(self._running))
            for row in self._taken_out():
                row.faults += 1
                if row.faults > FAULTS:
                    self._end(row, _fault(error))
                else:
                    self._join([row])
            return
        self._rows.advance()
        self.on_step(len(self._running))
        self._choose(list(self._running), logits)

    def _taken_out(self) -> list[_Row]:
        """All rows of the batch, which is empty then."""
        rows, self._running = self._running, []
        self._rows.clear()
        return rows

    def _choose(self, rows: list[_Row], logits: Tensor) -> None:
        """Append a token to each of the rows, from logits `(rows, V)`; those that end with it leave."""
        best, tokens = logits.topk(2, 1)
        leads = (best[:, 0] - best[:, 1]).tolist()
        for index, (row, lead) in enumerate(zip(rows, leads, strict=True)):
            scores, token = logits[index], int(tokens[index, 0])
            if not lead >= 0:  # NaN
                self._leave(row)
                self._end(row, EngineError("the model's output is not a number"))
                continue
            if row.sampling.temperature > 0:
                token = sample(scores, row.sampling, row.generator)
            elif lead < self.margin:
                self.near_ties += 1
                try:
                    scores = self._read([row], kept=0)[1][0]
                except Exception as error:
                    log.exception("a pass that decides a near tie failed")
                    self._leave(row)
                    self._end(row, _fault(error))
                    continue
                token = int(scores.argmax())
            row.tokens.append(token)
            self._outbox.append((row, described(token, scores, row.sampling.logprobs)))
            if token in row.sampling.ends or len(row.tokens) >= row.sampling.max_tokens:
                self._leave(row)
                self._end(row)

    def _end(self, row: _Row, error: EngineError | None = None) -> None:
        if not row.done:
            row.done = True
            self._outbox.append((row, error))

    def _leave(self, row: _Row) -> None:
        index = self._running.index(row)
        self._rows.leave(index)
        self._running[index] = self._running[-1]
        self._running.pop()

    def _read(self, rows: list[_Row], kept: int) -> tuple[list[States], Tensor]:
        """One pass over rows: each one's keys and values `(heads, L, d)`, and the logits `(rows, V)` of what follows.

        Args:
            rows: all with a prompt of this many kept virtual tokens.
            kept: as `_kept` says; 0 reads the prompts as well.
        """
        parts = []
        for row in rows:
            part = row.input.embeds[kept:]
            if row.tokens:
                ids = torch.tensor([row.tokens], device=part.device)
                part = torch.cat([part, self.model.adapters.embedding(ids)[0]])
            parts.append(part)
        width = max(map(len, parts))
        embeds = torch.stack([torch.nn.functional.pad(part, (0, 0, width - len(part), 0)) for part in parts])
        lengths = torch.tensor([[len(part)] for part in parts], device=embeds.device)
        mask = (torch.arange(width, device=embeds.device) >= width - lengths).long()
        cache = DynamicCache(config=self.base.config)
        cache.layers = [DynamicLayer() for _ in cache.layers]  # that keep everything, a window's layers as well
        if kept:
            before = [self._prefix(row) for row in rows]
            for index, states in enumerate(zip(*before, strict=True)):
                keys, values = zip(*states, strict=True)
                cache.update(torch.stack(keys), torch.stack(values), index)
            mask = torch.cat([mask.new_ones(len(rows), kept), mask], 1)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "past_key_values": cache}
        inputs |= self._changes(rows)
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        logits = self.base(**inputs, **self._options).logits[:, -1]
        real = mask.bool()
        layers = [
            [(layer.keys[index][:, one], layer.values[index][:, one]) for layer in cache.layers]
            for index, one in enumerate(real)
        ]
        return layers, logits

    def _changes(self, rows: list[_Row]) -> dict[str, Changes]:
        """The argument of a pass that says how the layers compute each of the rows, if any is computed otherwise."""
        changes = Changes.joined(len(rows), ((slice(at, at + 1), row.input.changes) for at, row in enumerate(rows)))
        if changes is None:
            return {}
        for of in changes.numbers.keys() - self._held:  # its last adapter may leave before the row does
            of.hold(self.base)
            self._held.add(of)
        return {CHANGES: changes}

    def _kept(self, row: _Row) -> int:
        """How many of the row's virtual tokens have their keys and values computed once and kept."""
        if row.input.prefix is None or not self._takes_positions or self.switches:
            return 0
        # A window counts the padding between the prompt and the tokens as well.
        if self._window is not None and len(row.input.embeds) + len(row.tokens) > self._window:
            return 0
        return row.input.virtual

    def _prefix(self, row: _Row) -> States:
        """Each layer's keys and values `(heads, T, d)` of the row's prompt."""
        key = row.input.prefix
        found = self._prefixes.pop(key, None)
        if found is None:
            alone = Input(row.input.embeds[: row.input.virtual], [])
            found = self._read([_Row(alone, row.sampling)], kept=0)[0][0]
        self._prefixes[key] = found  # the most recently used last
        each = sum(tensor.numel() * tensor.element_size() for pair in found for tensor in pair)
        while len(self._prefixes) > max(1, KEPT // each):
            self._prefixes.popitem(last=False)
        return found


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token from logits `(V,)`; the generator alone decides, whatever else is in the batch.

    Each token has a number of its own, so that the rounding of a batch, which may order tokens of almost the same
    probability otherwise, matters only where the two best are that close, or for the last one within `top_p`.
    """
    tiny = torch.finfo(torch.float32).tiny
    scaled = (logits.float() - logits.max()) / max(sampling.temperature, tiny)
    probabilities = scaled.softmax(0)
    if sampling.top_p < 1:
        ordered, tokens = probabilities.sort(descending=True, stable=True)
        kept = int((ordered.cumsum(0) - ordered < sampling.top_p).sum())
        probabilities[tokens[max(kept, 1) :]] = 0
    # A number may come out as 0, by which no probability of 0 may be divided.
    numbers = torch.empty(len(probabilities)).exponential_(generator=generator).clamp_(min=tiny)
    return int((probabilities / numbers.to(probabilities)).argmax())


def described(token: int, logits: Tensor, logprobs: int | None) -> Token:
    """A token with what was asked about it, from logits `(V,)`."""
    if logprobs is None:
        return Token(token)
    scores = logits.float().log_softmax(0)
    values, ids = scores.topk(min(logprobs, len(scores)))
    top = ((other, max(value, LEAST)) for other, value in zip(ids.tolist(), values.tolist(), strict=True))
    return Token(token, max(float(scores[token]), LEAST), tuple(top))


def _fault(error: Exception) -> EngineError:
    return EngineError(f"the engine failed on this request ({type(error).__name__})")
