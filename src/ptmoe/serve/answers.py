"""Answers in the form of OpenAI's completions and chat completions, whole or in chunks."""

import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ptmoe.serve.api import Choice, Completion, Details, Parameters, RoutingInfo, Usage
from ptmoe.serve.engine import Token
from ptmoe.serve.service import Run
from ptmoe.serve.text import Said


class Shape:
    """One response to a request."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, run: Run, body: Parameters, token_text: Callable[[int], str]) -> None:
        self.run, self.body, self.token_text = run, body, token_text
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.said = [Said() for _ in range(len(run.rows) * run.copies)]

    # -- whole -------------------------------------------------------------------------------------------------------

    def add(self, index: int, said: Said) -> None:
        """A piece of one answer."""
        whole = self.said[index]
        whole.text += said.text
        whole.tokens += said.tokens
        whole.finish = said.finish

    def whole(self) -> bytes:
        """The response, once every answer is complete."""
        choices = [self._choice(index, said, "whole") for index, said in enumerate(self.said)]
        return self._json(self.kind, choices, usage=self._usage())

    # -- in chunks ---------------------------------------------------------------------------------------------------

    def first(self) -> Iterator[str]:
        """Chunks before any piece."""
        yield from ()

    def chunk(self, index: int, said: Said) -> str:
        return self._json(self.chunk_kind, [self._choice(index, said, "chunk")]).decode()

    def last(self) -> Iterator[str]:
        """Chunks behind all pieces."""
        if self.body.with_usage:
            yield self._json(self.chunk_kind, [], usage=self._usage()).decode()

    # -- parts -------------------------------------------------------------------------------------------------------

    def _json(self, kind: str, choices: list[Choice], **more: Any) -> bytes:
        made = Completion(id=self.id, object=kind, created=self.created, model=self.body.model, choices=choices, **more)
        return made.model_dump_json(exclude_unset=True).encode()

    def _usage(self) -> Usage:
        prompt, new = self.run.prompt_tokens, self.run.completion_tokens
        details = Details(virtual_tokens=self.run.virtual_tokens)
        return Usage(
            prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=details
        )

    def _choice(self, index: int, said: Said, part: str) -> Choice:
        values = self._content(said, part)
        if self.body.ptmoe:
            row = self.run.rows[index // self.run.copies]
            values["ptmoe"] = RoutingInfo(expert=row.expert, gate=row.gate)
        asked = self.body.logprobs  # type: ignore[attr-defined]  # both bodies have it
        logprobs = self._logprobs(said.tokens) if asked is not None and asked is not False else None
        return Choice(index=index, logprobs=logprobs, finish_reason=said.finish, **values)

    def _content(self, said: Said, part: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        raise NotImplementedError


class TextShape(Shape):
    """`/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _content(self, said: Said, part: str) -> dict[str, Any]:
        return {"text": said.text}

    def _logprobs(self, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        return {
            "tokens": [self.token_text(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [self._top(token) for token, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The best first. Of tokens with the same text, such as parts of characters, the best one's value."""
        values: dict[str, float] = {}
        for other, value in token.top:
            values.setdefault(self.token_text(other), value)
        return values


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> Iterator[str]:
        for index in range(len(self.said)):
            choice = Choice(index=index, delta={"role": "assistant", "content": ""}, logprobs=None, finish_reason=None)
            yield self._json(self.chunk_kind, [choice]).decode()

    def _content(self, said: Said, part: str) -> dict[str, Any]:
        if part == "chunk":
            return {"delta": {"content": said.text} if said.text else {}}
        return {"message": {"role": "assistant", "content": said.text, "refusal": None}}

    def _logprobs(self, tokens: list[tuple[Token, int]]) -> dict[str, Any]:
        content = [
            {**self._named(token.id, token.logprob), "top_logprobs": [self._named(*other) for other in token.top]}
            for token, _ in tokens
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        # Of a part of a character the text does not say which bytes it is.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
