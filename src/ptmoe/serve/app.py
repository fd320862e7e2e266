"""The HTTP server: OpenAI's API over a `Service`."""

import asyncio
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import takewhile
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ptmoe import __version__
from ptmoe.errors import PtmoeError, shown
from ptmoe.serve.answers import ChatShape, Shape, TextShape
from ptmoe.serve.api import ChatBody, Completion, CompletionBody, ErrorBody, ModelInfo, ModelList, Parameters
from ptmoe.serve.engine import EngineError, Sampling, UnavailableError
from ptmoe.serve.playground import playground
from ptmoe.serve.registry import UnknownModelError
from ptmoe.serve.service import BusyError, DeadlineError, Prompt, Run, Service

DEFAULT_TOKENS = 16  # of a completion, as OpenAI has it
GRACE = 10.0  # seconds beyond the deadline in which a client may still read its answer
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
BEARER = HTTPBearer(auto_error=False)
FORM = re.compile(r"\[|^(constrained-)?str$")  # how pydantic calls one of the forms that a parameter may have
PATHS = (
    "/v1/completions, /v1/chat/completions, /v1/models, /health and /metrics, and with --admin-key PUT and DELETE "
    "/v1/adapters/NAME to serve, or no longer serve, an adapter of its folder"
)
STATUSES = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)

log = logging.getLogger(__name__)


class GoneError(RuntimeError):
    """The client has closed the connection."""


EXPECTED = (PtmoeError, BusyError, DeadlineError, GoneError, EngineError)


def create_app(
    service: Service,
    *,
    api_keys: Sequence[str] = (),
    admin_key: str | None = None,
    origins: Sequence[str] = (),
    with_playground: bool = True,
) -> FastAPI:
    """The server's application.

    Args:
        service: what answers.
        api_keys: one of which every request under `/v1`, and `/metrics`, has to carry, but for those under
            `/v1/adapters`; none are needed by default.
        admin_key: what `/v1/adapters` needs; without one it is closed.
        origins: of browsers' pages that may use the server (CORS).
        with_playground: serve a page at `/` that asks this API; the page itself needs no key.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        service.registry.watch()
        yield
        service.registry.stop()
        await service.engine.stop()

    app = FastAPI(title="ptmoe", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, service=service)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    client, admin = _key(api_keys), _key([admin_key] if admin_key else None)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in STATUSES}
    _answer_errors(app)
    describe = app.openapi

    def described() -> dict[str, Any]:
        """FastAPI writes down its own answer to an invalid body as well, which here is a 400."""
        schema = describe()
        for operation in (one for path in schema["paths"].values() for one in path.values()):
            operation["responses"].pop("422", None)
        return schema

    app.openapi = described  # type: ignore[method-assign]

    if with_playground:
        page, headers = playground()

        @app.get("/", include_in_schema=False)
        async def root() -> Response:
            return Response(page, media_type="text/html", headers=headers)

    @app.get("/health", responses={503: {}})
    async def health() -> Response:
        """Whether the engine answers."""
        engine = await service.engine.health()
        found = service.registry.listing().values()
        about = {
            "status": "ok" if engine["ok"] else "failing",
            "base": service.registry.base,
            "engine": {"name": service.engine.name, **engine},
            "adapters": sum(one["served"] for one in found),
            "broken_adapters": sum("error" in one for one in found),
            "in_progress": service.in_flight,
        }
        return JSONResponse(about, 200 if engine["ok"] else 503)

    @app.get("/metrics", dependencies=[Depends(client)], responses=errors, response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=[Depends(client)], responses=errors)
    async def models() -> ModelList:
        """The base and the adapters."""
        return ModelList(data=[_info(service, name) for name in service.registry.names()])

    @app.get("/v1/models/{model:path}", dependencies=[Depends(client)], responses=errors)
    async def model(model: str) -> ModelInfo:
        await service.in_thread(service.registry.entry, model)
        return _info(service, model)

    streamed: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}
    completion: dict[str, Any] = {
        "response_model": Completion,
        "responses": errors | streamed,
        "dependencies": [Depends(client)],
    }

    @app.post("/v1/completions", **completion)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """The text that follows a text."""
        sampling = _sampling(body, body.logprobs)
        most = min(DEFAULT_TOKENS, service.limits.max_tokens) if body.max_tokens is None else body.max_tokens
        return await _answered(service, request, body, TextShape, body.prompts, sampling, most)

    @app.post("/v1/chat/completions", **completion)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """The next message of a conversation."""
        sampling = _sampling(body, body.top_logprobs or 0 if body.logprobs else None)
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        messages: list[Prompt] = [[message.plain() for message in body.messages]]
        return await _answered(service, request, body, ChatShape, messages, sampling, most)

    @app.get("/v1/adapters", dependencies=[Depends(admin)], responses=errors)
    async def adapters() -> Response:
        """Every adapter in the folder, also those that are not served, and why."""
        return JSONResponse(service.registry.listing())

    @app.put("/v1/adapters/{name}", dependencies=[Depends(admin)], responses=errors)
    async def add(name: str) -> Response:
        """Serve what is now in the folder under this name; nothing is sent."""
        await service.in_thread(service.registry.add, name)
        return JSONResponse(service.registry.listing()[name])

    @app.delete("/v1/adapters/{name}", dependencies=[Depends(admin)], responses=errors)
    async def withdraw(name: str) -> Response:
        """Serve this adapter no more; its files stay where they are."""
        await service.in_thread(service.registry.withdraw, name)
        return JSONResponse(service.registry.listing()[name])

    return app


def _info(service: Service, name: str) -> ModelInfo:
    owner = "base" if name == service.registry.base else "ptmoe"
    return ModelInfo(id=name, created=service.registry.created(name), owned_by=owner)


def _sampling(body: Parameters, logprobs: int | None) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(0, temperature, top_p, body.seed, logprobs)


async def _answered(
    service: Service,
    request: Request,
    body: Parameters,
    shape: type[Shape],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    max_tokens: int | None,
) -> Response:
    run = await service.run(body.model, prompts, sampling, max_tokens=max_tokens, stop=body.stops, copies=body.n or 1)
    answer = shape(run, body, service.token_text)
    if body.stream:
        return _EventStream(run, answer)
    # A server's handler is not told that its client has gone: it has to ask.
    gone = asyncio.create_task(_disconnected(request))
    gone.add_done_callback(lambda _: run.events.put_nowait((0, GoneError("the client has gone"))))
    try:
        async for index, said in run.pieces():
            answer.add(index, said)
    finally:
        gone.cancel()
    # Naming the likeliest tokens at every position takes longer than other requests should wait.
    whole = await service.in_thread(answer.whole) if sampling.logprobs else answer.whole()
    return Response(whole, media_type="application/json")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """An answer as it comes; it is given up when its client goes away, whether or not it had begun."""

    def __init__(self, run: Run, answer: Shape) -> None:
        self.run = run
        super().__init__(self._events(answer), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _events(self, answer: Shape) -> AsyncIterator[str]:
        try:
            for chunk in answer.first():
                yield f"data: {chunk}\n\n"
            async for index, said in self.run.pieces():
                yield f"data: {answer.chunk(index, said)}\n\n"
            for chunk in answer.last():
                yield f"data: {chunk}\n\n"
        except Exception as error:
            if not isinstance(error, EXPECTED):
                log.exception("a request failed")
            yield f"data: {json.dumps(_problem(error)[1])}\n\n"
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.run.close()


# -- keys, limits and errors -------------------------------------------------------------------------------------------


def _key(keys: Sequence[str] | None) -> Callable[..., Awaitable[None]]:
    """A dependency: the request carries one of the keys. None refuses everyone, an empty sequence nobody."""
    known = [key.encode(errors="surrogateescape") for key in keys or ()]  # the bytes of the command line

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        if keys is None:
            raise HTTPException(403, "this server was started without the key that manages adapters: --admin-key")
        token = b"" if given is None else given.credentials.encode("latin-1")  # the bytes that were sent
        matches = [hmac.compare_digest(token, key) for key in known]  # all of them, whichever fits
        if known and not any(matches):
            raise HTTPException(401, "no valid API key: send one as 'Authorization: Bearer KEY'")

    return check


class Guard:
    """Around everything: no body larger and no request longer than the limits, every fault answered and every response
    counted.

    The deadline here is for clients that stop sending, or stop reading; that of an answer is the service's.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limits, size, read, started = self.service.limits, 0, False, False

        async def counted_receive() -> Message:
            nonlocal size, read
            message = await receive()
            read = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > limits.max_body:
                raise HTTPException(413, f"the request has more than {limits.max_body:,} bytes: shorten it")
            return message

        async def counted_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.service.metrics.requests.labels(message["status"]).inc()
            await send(message)

        try:
            await asyncio.wait_for(self.app(scope, counted_receive, counted_send), limits.deadline + GRACE)
        except asyncio.TimeoutError:
            seconds = limits.deadline + GRACE
            log.warning("a client took longer than %g s to send or read", seconds)
            if started:  # the server closes the connection
                self.service.metrics.requests.labels("timeout").inc()
                return
            late = HTTPException(504 if read else 408, f"the request took longer than {seconds:g} s")
            await _response(late, {"Connection": "close"})(scope, receive, counted_send)
        except Exception as error:
            if started:
                raise
            # Starlette would answer outside of this, uncounted, and uvicorn then close the connection unannounced.
            log.exception("a request failed")
            await _response(error)(scope, receive, counted_send)


def _response(error: Exception, more: dict[str, str] | None = None) -> Response:
    """An error in the API's form, with `more` headers."""
    status, body, headers = _problem(error)
    return JSONResponse(body, status, headers | (more or {}))


def _problem(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error."""
    status, param, code, headers = 500, None, None, {}
    message = str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
        if message == "Not Found":  # of FastAPI, for a path
            message = f"this server has no such path; it has {PATHS}"
    elif isinstance(error, RequestValidationError):
        status, (message, param) = 400, _invalid(error)
    elif isinstance(error, UnknownModelError):
        status, param, code = 404, "model", "model_not_found"
    elif isinstance(error, PtmoeError):
        status = 400
    elif isinstance(error, BusyError):
        status, headers = 429, {"Retry-After": str(error.retry_after)}
    elif isinstance(error, DeadlineError):
        status = 504
    elif isinstance(error, GoneError):
        status = 499  # nobody reads it; for the metrics
    elif isinstance(error, UnavailableError):
        status, headers = 503, {"Retry-After": "1"}
    elif not isinstance(error, EngineError):
        message = "the server failed on this request"  # what it was is for the log
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message = message.encode(errors="backslashreplace").decode()  # half characters, which no response can carry
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers


def _invalid(error: RequestValidationError) -> tuple[str, str | None]:
    """A message and the parameter it is about, from the first of what is wrong with a body."""
    found = [one for one in error.errors() if one["loc"][:2] == error.errors()[0]["loc"][:2]]
    # Of the forms that a parameter may have, the one that was meant is the one whose type fits.
    first = next((one for one in found if not one["type"].endswith("_type")), found[0])
    places = [str(part) for part in first["loc"][1:]]
    where = ".".join(takewhile(lambda part: not FORM.search(part), places))
    param = first.get("ctx", {}).get("param") or (places[0] if places else None)
    if first["type"] == "not_honoured":
        return first["msg"], param
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {shown(where)}: this server would not honour it; leave it out", param
    if first["type"] == "json_invalid":
        return "the body is not JSON", None
    if first["loc"] == ("body",) and not isinstance(error.body, dict):
        return "the body has to be a JSON object, with the header 'Content-Type: application/json'", None
    return f"{where}{': ' if where else ''}{first['msg'][0].lower()}{first['msg'][1:]}", param


def _answer_errors(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> Response:
        return _response(error)

    for kind in (HTTPException, RequestValidationError, *EXPECTED):
        app.add_exception_handler(kind, answer)
