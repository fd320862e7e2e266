"""The engine that is somewhere else: a `vllm serve --enable-prompt-embeds`, or several, which know nothing of adapters.

Each row goes to `/v1/completions` as embeddings, and comes back as a stream of token ids. Of the base this side holds
the embedding matrix alone (`ptmoe.serve.matrix`).

An upstream is tried out when it is first reached: the same few tokens are sent as ids and as embeddings, and what it
expects next must be the same. That finds another base, embeddings that it treats in another way, and a missing flag.
"""

import asyncio
import base64
import io
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor, nn

from ptmoe.errors import PtmoeError
from ptmoe.serve.engine import EngineError, Input, Sampling, Token, UnavailableError, check_room
from ptmoe.serve.vllm_request import TRIED, agree, parameters, probe

CONNECT = 5.0  # seconds
POLL = 5.0  # seconds between looks at the upstreams
STREAMED = {"stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
BROKEN = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)  # of what is no answer
NEEDED = "start it as `vllm serve MODEL --enable-prompt-embeds`"

log = logging.getLogger(__name__)


class MisfitError(PtmoeError):
    """An upstream that answers, and cannot be used."""


@dataclass
class Upstream:
    """An inference engine."""

    url: str  # without `/v1`
    fault: str | None = "not reached yet"  # why it is not used; None where it is
    tried: bool = False  # whether it was found to fit
    model: str = ""  # its own name of the base
    rows: int = 0  # that it is answering
    doubt: str = ""  # why it is used only where no other can be

    @property
    def shown(self) -> str:
        """Its URL without a password, for messages, the log and `/health`, which anybody may read."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def state(self) -> str:
        return self.fault or self.doubt or "ok"


class GatewayEngine:
    """
    Args:
        urls: of the upstreams, which serve one base.
        embedding: of that base, `(B, L)` ids to `(B, L, H)`.
        positions: of the base, as its config has it; an upstream may have fewer.
        timeout: seconds without a token after which an upstream is given up.
        api_key: of the upstreams.

    Raises:
        PtmoeError: what is no URL of a server, or a key that no request can carry.
    """

    name = "gateway"

    def __init__(
        self,
        urls: Sequence[str],
        embedding: nn.Module,
        *,
        positions: int | None = None,
        timeout: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        self.upstreams = [Upstream(_address(url)) for url in urls]
        self.positions = positions
        self._embedding, self._timeout = embedding, timeout
        if api_key is not None and not re.fullmatch("[!-~]+", api_key):
            raise PtmoeError("the engines' API key has characters that a request cannot carry, or none: give another")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._watching: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._client = self._open()
        await self._look()
        # Each by itself: one that hangs while it is tried out keeps none of the others waiting.
        self._watching = [asyncio.create_task(self._watch(upstream)) for upstream in self.upstreams]

    async def stop(self) -> None:
        for task in self._watching:
            task.cancel()
        await self._client.aclose()

    async def health(self) -> dict[str, Any]:
        about = {upstream.shown: upstream.state for upstream in self.upstreams}
        return {"ok": any(upstream.fault is None for upstream in self.upstreams), "upstreams": about}

    async def check(self) -> dict[str, str]:
        """Try the upstreams out before anything is served; the faults of those that cannot be reached.

        Raises:
            PtmoeError: one can be reached and cannot be used.
        """
        async with self._open() as self._client:
            faults = {}
            for upstream in self.upstreams:
                try:
                    await self._try(upstream)
                    upstream.fault = None
                except httpx.HTTPError as error:
                    faults[upstream.shown] = _down(error)
        return faults

    async def generate(self, row: Input, sampling: Sampling) -> AsyncGenerator[Token, None]:
        """As `Engine.generate`. An upstream that fails before its first token is replaced by another."""
        check_room(row, sampling.max_tokens, self.positions)
        body = parameters(sampling) | {"prompt_embeds": encoded(row.embeds)}
        reason = "none can be reached, and /health says why"
        left = sorted((one for one in self.upstreams if one.fault is None), key=lambda one: (bool(one.doubt), one.rows))
        while left:
            upstream, started = left.pop(0), False
            upstream.rows += 1
            try:
                async with aclosing(self._stream(upstream, body)) as tokens:
                    async for token in tokens:
                        started = True
                        yield token
                return
            except (httpx.HTTPError, UnavailableError) as error:
                reason = str(error) if isinstance(error, UnavailableError) else _down(error)
                log.warning("%s: %s", upstream.shown, reason)
                if isinstance(error, httpx.ConnectError):
                    upstream.fault = reason  # until the next look at it
                elif isinstance(error, httpx.TransportError) and not isinstance(error, httpx.TimeoutException):
                    upstream.doubt = "broke an answer off"  # not yet one that is gone
                if started:
                    raise EngineError("the inference engine failed in the middle of the answer") from None
            finally:
                upstream.rows -= 1
        raise UnavailableError(f"no inference engine answers: {reason}")

    # -- upstreams ---------------------------------------------------------------------------------------------------

    def _open(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._timeout, connect=CONNECT, pool=None)
        # A connection of its own for each request: one that is kept may be closed by the engine just as it is used
        # again, which looks like an engine that is gone.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(headers=self._headers, timeout=timeout, limits=limits)

    async def _watch(self, upstream: Upstream) -> None:
        while True:
            await asyncio.sleep(POLL)
            await self._look_at(upstream)

    async def _look(self) -> None:
        await asyncio.gather(*map(self._look_at, self.upstreams))

    async def _look_at(self, upstream: Upstream) -> None:
        before, doubt = upstream.state, ""
        try:
            if upstream.tried and upstream.fault is None:
                (await self._client.get(f"{upstream.url}/health", timeout=CONNECT)).raise_for_status()
            else:  # it may be another one by now
                await self._try(upstream)
            upstream.fault = None
        except MisfitError as error:
            upstream.fault = str(error)
        except httpx.HTTPError as error:
            # One that is loaded is slow to say so; the requests to it have a time-out of their own.
            doubt = "slow to answer" if upstream.fault is None and isinstance(error, httpx.ReadTimeout) else ""
            upstream.fault = None if doubt else _down(error)
        upstream.doubt = doubt
        if upstream.state != before:
            log.warning("%s: %s", upstream.shown, upstream.state)

    async def _try(self, upstream: Upstream) -> None:
        """
        Raises:
            MisfitError: it is no vLLM with prompt embeddings, or has another base.
            httpx.HTTPError: it cannot be reached.
        """
        upstream.tried = False
        listed = await self._client.get(f"{upstream.url}/v1/models", timeout=CONNECT)
        try:
            listed.raise_for_status()
            about = listed.json()["data"][0]
            upstream.model, positions = str(about["id"]), about.get("max_model_len")
        except (httpx.HTTPStatusError, *BROKEN) as error:
            raise MisfitError(f"{upstream.shown} lists no model ({type(error).__name__}): {NEEDED}") from None
        ids, embeds = probe(self._embedding)
        answers = []
        for way, prompt in (("ids", {"prompt": ids}), ("embeddings", {"prompt_embeds": encoded(embeds)})):
            try:
                async with aclosing(self._stream(upstream, parameters(TRIED) | prompt)) as tokens:
                    answers.append([token async for token in tokens])
            except UnavailableError as error:
                raise httpx.ReadError(str(error)) from None
            except EngineError as error:
                raise MisfitError(f"{upstream.shown} does not take {way} ({error!s:.300}): {NEEDED}") from None
        if not agree(*answers):
            raise MisfitError(
                f"{upstream.shown} ({upstream.model}) does not answer embeddings as it answers the tokens that they "
                "stand for: it serves another base than the adapters', or treats embeddings in another way"
            )
        if isinstance(positions, int):
            self.positions = positions if self.positions is None else min(self.positions, positions)
        upstream.tried = True

    # -- one row -----------------------------------------------------------------------------------------------------

    async def _stream(self, upstream: Upstream, body: dict[str, Any]) -> AsyncGenerator[Token, None]:
        url = f"{upstream.url}/v1/completions"
        async with self._client.stream("POST", url, json=body | STREAMED | {"model": upstream.model}) as answer:
            if answer.status_code != 200:
                said = " ".join((await answer.aread()).decode(errors="replace").split())[:300]
                kind = UnavailableError if answer.status_code in (429, 502, 503, 504) else EngineError
                raise kind(f"the inference engine refuses the request ({answer.status_code}: {said})")
            reason, last = None, time.monotonic()
            async for line in _lines(answer):
                if time.monotonic() - last > self._timeout:  # httpx waits for any bytes, as a proxy sends to stay open
                    raise httpx.ReadTimeout("no token")
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                try:
                    event = json.loads(data)
                    for token in _tokens(event, body.get("logprobs")):
                        yield token
                        last = time.monotonic()
                    reason = next((choice.get("finish_reason") for choice in event["choices"]), reason)
                except BROKEN as error:
                    raise EngineError(
                        f"the inference engine does not send token ids ({type(error).__name__}): is it a recent vLLM?"
                    ) from None
            if reason not in ("stop", "length"):  # as when it is shut down
                raise UnavailableError(f"the inference engine gave the request up ({reason})")


async def _lines(answer: httpx.Response) -> AsyncGenerator[str, None]:
    """The lines of a stream. httpx's own end at U+2028 and the like as well, which vLLM's JSON holds as they are."""
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")


def _address(url: str) -> str:
    """Of a server: its URL without `/v1`."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and url.isprintable() and parts.port != 0
    except ValueError:  # a port that is none
        fits = False
    if not fits:
        raise PtmoeError(f"unknown engine {url!r}: needs http://HOST:PORT of a vLLM server")
    return url.rstrip("/").removesuffix("/v1")


def _tokens(event: dict[str, Any], logprobs: int | None) -> list[Token]:
    """The tokens of one event of a stream."""
    if "error" in event:
        raise EngineError(f"the inference engine failed ({event['error']!s:.200})")
    if not event["choices"]:
        return []  # the usage
    choice = event["choices"][0]
    ids = [int(token) for token in choice["token_ids"] or []]
    if logprobs is None or not ids:
        return [Token(token) for token in ids]
    about = choice["logprobs"] or {}
    tokens = []
    for token, own, others in zip(ids, about["token_logprobs"], about["top_logprobs"], strict=True):
        named = [(int(name.removeprefix("token_id:")), float(value)) for name, value in (others or {}).items()]
        tokens.append(Token(token, float(own), tuple(sorted(named, key=lambda pair: -pair[1])[:logprobs])))
    return tokens


def encoded(embeds: Tensor) -> str:
    """`(L, H)` as vLLM takes it: base64 of `torch.save`."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), file)  # a view would be saved with everything it is a view of
    return base64.b64encode(file.getvalue()).decode()


def _down(error: Exception) -> str:
    slow = isinstance(error, httpx.ReadTimeout)
    return f"it {'takes too long' if slow else 'cannot be reached'} ({type(error).__name__})"
