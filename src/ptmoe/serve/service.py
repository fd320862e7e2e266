"""From a request to its answers: admission, tokens, prompts, generation, text. It knows no HTTP."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ptmoe.errors import PtmoeError
from ptmoe.serve.engine import Engine, Sampling, check_room
from ptmoe.serve.limits import Limits
from ptmoe.serve.metrics import Metrics
from ptmoe.serve.registry import Composed, Registry
from ptmoe.serve.text import Said, Text
from ptmoe.tasks.base import Example
from ptmoe.tasks.tokens import decoded, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
PACE = 0.1  # of the running mean of an answer's seconds
PREPARED_AT_ONCE = 4  # requests

Prompt = str | list[int] | list[dict[str, str]]  # a text, token ids, or a conversation


class BusyError(RuntimeError):
    """The queue is full.

    Attributes:
        retry_after: seconds, an estimate.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests are waiting: try again in {retry_after} s")
        self.retry_after = retry_after


class DeadlineError(RuntimeError):
    """The request took too long."""


class Run:
    """The answers to one request, on their way.

    Attributes:
        rows: one for each prompt.
        copies: answers to each prompt.
    """

    def __init__(self, rows: list[Composed], copies: int, deadline: float) -> None:
        self.rows, self.copies = rows, copies
        self.completion_tokens = 0
        self.events: asyncio.Queue[tuple[int, Said | Exception]] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []
        late = DeadlineError(f"the answer took longer than {deadline:g} s: ask for fewer tokens")
        self._timer = asyncio.get_running_loop().call_later(deadline, self.events.put_nowait, (0, late))

    async def pieces(self) -> AsyncIterator[tuple[int, Said]]:
        """The pieces of all answers, each with its answer's index, as they come.

        Raises:
            EngineError, DeadlineError: an answer failed; the others are given up.
        """
        left = len(self.rows) * self.copies
        try:
            while left:
                index, event = await self.events.get()
                if isinstance(event, Exception):
                    raise event
                left -= event.finish is not None
                yield index, event
        finally:
            self.close()

    def close(self) -> None:
        """Give up what is not finished."""
        self._timer.cancel()
        for task in self.tasks:
            task.cancel()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(row.row.token_ids) for row in self.rows)

    @property
    def virtual_tokens(self) -> int:
        return sum(row.row.virtual for row in self.rows)


@dataclass
class Service:
    """Answers requests."""

    registry: Registry
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]  # tokens that end an answer
    limits: Limits
    metrics: Metrics

    def __post_init__(self) -> None:
        self.in_flight = 0
        self._started = False
        self._mean_seconds = 1.0
        self._threads = ThreadPoolExecutor(PREPARED_AT_ONCE, thread_name_prefix="ptmoe-prepare")
        # Some tokenizers come with truncation or padding on, which the first call turns off, before threads share it.
        self._before: list[int] = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        self._token_texts: dict[int, str] = {}  # of a few thousand tokens, that are asked for again and again

    async def start(self) -> None:
        """Start the engine, in the event loop of the server; a second call does nothing.

        Raises:
            PtmoeError: it cannot serve this base.
        """
        if not self._started:
            await self.engine.start()
            self._started = True

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what takes longer than the event loop should wait."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def run(
        self,
        model: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        max_tokens: int | None,
        stop: Sequence[str] = (),
        copies: int = 1,
    ) -> Run:
        """Begin to answer.

        Args:
            model: an adapter's name, or the base's.
            prompts: one or several.
            sampling: how tokens are chosen; its `max_tokens` is not read.
            max_tokens: of each answer; None for what the base and the limits leave room for.
            stop: texts that end an answer.
            copies: answers to each prompt.

        Raises:
            BusyError: the queue is full.
            PtmoeError: an unknown model, a prompt that cannot be encoded or is too long, or more than the limits allow.
        """
        count, limits = len(prompts) * copies, self.limits
        room = limits.max_batch + limits.queue
        most = min(limits.max_choices, room)
        if count > most:
            raise PtmoeError(f"{count} answers to one request: this server gives at most {most}")
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise PtmoeError(f"max_tokens={max_tokens}: this server gives at most {limits.max_tokens}")
        if self.in_flight + count > room:
            waiting = max(self.in_flight - limits.max_batch, 0) + count
            raise BusyError(max(1, math.ceil(waiting * self._mean_seconds / limits.max_batch)))
        self.in_flight += count
        self.metrics.waiting.set(self.in_flight)
        try:
            rows = await self.in_thread(self._prepare, model, prompts, max_tokens)
        except BaseException:
            self._release(count)
            raise
        run = Run(rows, copies, limits.deadline)
        for index in range(count):
            row = rows[index // copies]
            own = replace(
                sampling,
                max_tokens=self._most_tokens(row) if max_tokens is None else max_tokens,
                seed=None if sampling.seed is None else sampling.seed + index,
                ends=self.ends,
            )
            task = asyncio.create_task(self._answer(run, index, row, own, stop))
            task.add_done_callback(lambda _: self._release(1))
            run.tasks.append(task)
        self._count(model, run)
        return run

    def _release(self, count: int) -> None:
        self.in_flight -= count
        self.metrics.waiting.set(self.in_flight)

    def _count(self, model: str, run: Run) -> None:
        self.metrics.tokens.labels("prompt").inc(run.prompt_tokens)
        self.metrics.tokens.labels("virtual").inc(run.virtual_tokens)
        for row in run.rows:
            if row.expert is not None:
                self.metrics.experts.labels(model, row.expert).inc(run.copies)

    # -- before generation, in a thread ------------------------------------------------------------------------------

    def _prepare(self, model: str, prompts: Sequence[Prompt], max_tokens: int | None) -> list[Composed]:
        adapter, rows = self.registry.ready(model), list[Composed]()
        for prompt in prompts:
            ids = self._encode(prompt, None if adapter is None else adapter.chat)
            positions = self.engine.positions
            if positions is not None and len(ids) > positions:
                raise PtmoeError(f"the input has {len(ids):,} tokens, and the base {positions:,} positions: shorten it")
            row = self.registry.compose(model, ids)
            check_room(row.row, 1 if max_tokens is None else max_tokens, positions)
            rows.append(row)
        # All of one adapter, which was trained on such prompts: where it was replaced in the meantime, of the new one.
        return rows if self.registry.entry(model) is adapter else self._prepare(model, prompts, max_tokens)

    def _encode(self, prompt: Prompt, chat: bool | None) -> list[int]:
        if isinstance(prompt, str):
            example, in_template = Example("", prompt, "", (), ""), False
        elif isinstance(prompt[0], dict):
            example, in_template = self._conversation(prompt, chat)
        else:
            return prompt
        encoded = encode_prompt(example, self.tokenizer, chat=in_template)
        if encoded is None or not encoded.ids:
            raise PtmoeError("the prompt has no tokens: give a text")
        return encoded.ids

    def _conversation(self, messages: list[dict[str, str]], chat: bool | None) -> tuple[Example, bool]:
        """As the adapter was trained: in the chat template, or a single message as a plain text."""
        if self.tokenizer.chat_template and chat is not False:
            return Example("", "", "", (), "", messages=tuple(messages)), True
        if len(messages) == 1 and messages[0]["role"] == "user":
            return Example("", messages[0]["content"], "", (), ""), False
        why = "this adapter was trained on plain prompts" if chat is False else "the base has no chat template"
        raise PtmoeError(f"{why}: give one message, of the user, or use /v1/completions")

    def _most_tokens(self, row: Composed) -> int:
        positions = self.engine.positions
        room = self.limits.max_tokens if positions is None else positions - len(row.row.embeds)
        return min(room, self.limits.max_tokens)

    # -- generation --------------------------------------------------------------------------------------------------

    async def _answer(self, run: Run, index: int, row: Composed, sampling: Sampling, stop: Sequence[str]) -> None:
        """Put the pieces of one answer, or its failure, in the run's queue."""
        started, text = time.monotonic(), Text(self._decode, stop)
        count, last = 0, None
        try:
            async with aclosing(self.engine.generate(row.row, sampling)) as tokens:
                async for token in tokens:
                    if not count:
                        self.metrics.first.observe(time.monotonic() - started)
                    count, run.completion_tokens = count + 1, run.completion_tokens + 1
                    if token.id in sampling.ends:
                        last = token
                        break
                    said = text.add(token)
                    if text.stopped:
                        said.finish = "stop"
                        run.events.put_nowait((index, said))
                        return
                    if said.text:
                        run.events.put_nowait((index, said))
            run.events.put_nowait((index, text.end("length" if last is None else "stop", last)))
        except Exception as error:
            run.events.put_nowait((index, error))
        finally:
            seconds = time.monotonic() - started
            self._mean_seconds += PACE * (seconds - self._mean_seconds)
            self.metrics.whole.observe(seconds)
            self.metrics.tokens.labels("completion").inc(count)

    def _decode(self, ids: list[int]) -> str:
        return decoded(self.tokenizer, ids, special=False)

    def token_text(self, token: int) -> str:
        """A token by itself; special ones by their names. Some tokenizers drop the space of a text's first token."""
        if token not in self._token_texts:
            text, before = (decoded(self.tokenizer, ids) for ids in ([*self._before, token], self._before))
            self._token_texts[token] = text.removeprefix(before)
        return self._token_texts[token]
